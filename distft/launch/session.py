"""The controller's end of one ssh: what it asks the starter on a host (node.py), and what comes back.

One connection lasts from the first question to the end of the run. ssh itself notices within LOST_SECONDS that a host
has gone silent.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from distft.config.redact import redact
from distft.launch.node import MARK
from distft.launch.start import package_path

OPTIONS = "DISTFT_SSH_OPTIONS"  # environment: more words for ssh, such as -F and a file; a person's own, never a knob
CONNECT_SECONDS = 10
ALIVE_SECONDS, ALIVE_COUNT = 5, 4
ANSWER_SECONDS = 60.0
KILL_SECONDS = 10.0  # in which a host has to confirm that its ranks are killed
LOST = 255  # ssh's own exit code, and the code of ranks of which nothing is known


def ssh_options(port: int | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What stands between `ssh` and the host. Of an option given twice ssh takes the first."""
    options = shlex.split(environment.get(OPTIONS, ""))
    options += ["-p", str(port)] if port is not None else []
    for option in (
        "BatchMode=yes",
        "ClearAllForwardings=yes",
        f"ConnectTimeout={CONNECT_SECONDS}",
        f"ServerAliveInterval={ALIVE_SECONDS}",
        f"ServerAliveCountMax={ALIVE_COUNT}",
    ):
        options += ["-o", option]
    return options


def ssh_command(host: str, port: int | None, words: Sequence[str]) -> list[str]:
    """`words` on `host`: quoted, since a shell reads them there."""
    return ["ssh", "-T", *ssh_options(port), "--", host, shlex.join(words)]


def node_words() -> list[str]:
    """The starter on a host. The environment there is a login's, so that what it needs is said here."""
    settings = [f"{name}={value}" for name, value in package_path().items()]
    return ["env", *settings, sys.executable, "-m", "distft.launch.node"]


class HostLost(Exception):
    """ssh to a host ended, or the host does not answer."""


class Session:
    """One host of a run. Use `ask` for what has an answer, `tell` for what has none."""

    def __init__(self, host: str, port: int | None) -> None:
        self.host = host
        self.process = subprocess.Popen(
            ssh_command(host, port, node_words()),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
        )  # fmt: skip
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.words: deque[str] = deque(maxlen=20)  # that are not ours: ssh's, a shell's, a traceback's
        self.left: dict[int, int] = {}  # exit codes of the processes of this start, by number
        self.ended: dict[int, int] = {}  # the same of ranks under a launcher
        self.dropped = ""  # why this end gave up
        self.closed = threading.Event()
        self.writing = threading.Lock()
        self.deadline = float("inf")  # of a kill that was asked for
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.threads = [
            threading.Thread(target=self.hear, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self.overhear, args=(self.process.stderr,), daemon=True),
            threading.Thread(target=self.be_heard, daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    # --- what comes ------------------------------------------------------------------------------------------------

    def hear(self, stream: IO[bytes]) -> None:
        for raw in stream:
            text = raw.decode(errors="replace")
            if not text.startswith(MARK):
                self.words.append(text.strip())
                continue
            message = json.loads(text.removeprefix(MARK))
            if "answer" in message:
                self.answers.put(message["answer"])
            elif "output" in message:
                write_all(message["output"], message["text"].encode("latin-1"))
            elif "left" in message:
                self.left[message["left"]] = message["code"]
            elif "ended" in message:
                self.ended[message["ended"]] = message["code"]
        self.process.wait()
        self.answers.put(None)

    def overhear(self, stream: IO[bytes]) -> None:
        for raw in stream:
            self.words.append(raw.decode(errors="replace").strip())

    def be_heard(self) -> None:
        """The starter takes silence for the end of this process."""
        while not self.closed.wait(ALIVE_SECONDS):
            self.tell("be")

    # --- what goes -------------------------------------------------------------------------------------------------

    def tell(self, do: str, **values: Any) -> None:
        """Say something that has no answer. To a host that is lost nothing is said."""
        assert self.process.stdin is not None
        try:
            with self.writing:
                self.process.stdin.write((json.dumps({"do": do, **values}) + "\n").encode())
                self.process.stdin.flush()
        except (OSError, ValueError):
            return

    def ask(self, do: str, seconds: float = ANSWER_SECONDS, **values: Any) -> dict[str, Any]:
        """
        Raises:
            HostLost: no answer in time.
        """
        self.tell(do, **values)
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        try:
            found = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.drop(f"it did not answer within {seconds:.0f} s")
            raise HostLost(self.lost) from None
        if found is None:
            raise HostLost(self.lost)
        return found

    @property
    def lost(self) -> str:
        """Why this host is no longer there; empty while it is."""
        if self.dropped:
            return self.dropped
        code = self.process.poll()
        if code is None:
            return ""
        self.threads[1].join(1.0)
        said = [word for word in self.words if word]
        return redact(said[-1].rstrip(".")) if said else f"ssh to it ended with exit code {code}"

    @property
    def speaks_ssh(self) -> bool:
        """Whether it was reached, and what was started there ended: not an end of ssh itself."""
        return self.process.poll() not in (None, LOST)

    def drop(self, reason: str) -> None:
        self.dropped = self.dropped or reason
        if self.process.poll() is None:
            self.process.kill()

    def begin(self) -> None:
        self.left, self.ended, self.deadline = {}, {}, float("inf")

    def kill(self) -> None:
        """End what runs there. A host that does not confirm it counts as lost."""
        self.tell("kill")
        self.deadline = min(self.deadline, time.monotonic() + KILL_SECONDS)

    def code_of(self, number: int) -> int | None:
        """Exit code of a process of this start, None while it runs."""
        if number in self.left:
            return self.left[number]
        if time.monotonic() > self.deadline:
            self.drop("it does not answer")
        if self.lost:
            self.threads[0].join(1.0)  # what it said last
            return self.left.get(number, LOST)
        return None

    def leave(self) -> None:
        """Ask the starter to end, and all that is left of the run there."""
        self.closed.set()
        self.tell("leave")

    def close(self) -> None:
        self.leave()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Remote:
    """A process on a host, as far as watch.py asks one of this machine."""

    def __init__(self, session: Session, number: int) -> None:
        self.session, self.number = session, number

    def poll(self) -> int | None:
        return self.session.code_of(self.number)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.05)
        return code


class Attended:
    """The ranks that a launcher starts on a host, as one process."""

    def __init__(self, session: Session, ranks: Sequence[int]) -> None:
        self.session, self.ranks = session, ranks

    def poll(self) -> int | None:
        codes = [self.session.ended.get(rank) for rank in self.ranks]
        failed = next((code for code in codes if code), None)
        if None not in codes:
            return failed or 0
        if time.monotonic() > self.session.deadline:
            self.session.drop("it does not answer")
        return LOST if self.session.lost else failed

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.05)
        return code


def write_all(descriptor: int, text: bytes) -> None:
    (sys.stdout if descriptor == 1 else sys.stderr).flush()
    try:
        while text:
            text = text[os.write(descriptor, text) :]
    except OSError:  # nobody reads it
        return


def at_once(sessions: Sequence[Session], do: str, **values: Any) -> dict[str, dict[str, Any] | HostLost]:
    """Ask all hosts the same at the same time; each one's answer, or how it was lost."""

    def ask(session: Session) -> dict[str, Any] | HostLost:
        try:
            return session.ask(do, **values)
        except HostLost as lost:
            return lost

    with ThreadPoolExecutor(max(1, len(sessions))) as pool:
        return {session.host: answer for session, answer in zip(sessions, pool.map(ask, sessions), strict=True)}
