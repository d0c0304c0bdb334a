"""What runs on each host of a run: `python -m distft.launch.node`, started over ssh by session.py.

It is told over its input what to find out and what to start, a JSON object a line, and answers on its output. Variables
and secrets come that way too, so that no command line shows them. It ends its processes when the one that started it
is gone: its input ends, or nothing has come over it for SILENT_SECONDS.

Under deepspeed's launcher, which starts the ranks itself, it only attends: it lays the variables down in a file that
this user alone may read, until every rank has read it, and reports how the ranks end.
"""

from __future__ import annotations

import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from distft.launch import facts
from distft.launch.start import STATUS_FOLDER
from distft.launch.watch import numbers_in
from distft.parent import PARENT
from distft.pulse import FOLDER

MARK = "distft-node "  # begins each line of ours: a login shell may print others
SILENT_SECONDS = 60.0
LEAVE_SECONDS = 60.0  # what ranks get to save and end when the controller is gone
PASS_SECONDS = 0.05
VARIABLES = "environment.json"

Process = subprocess.Popen[bytes]


class Node:
    """One host's part of a run. Its folder in memory holds heartbeats, process ids and exit codes."""

    def __init__(self, output: IO[bytes]) -> None:
        self.output, self.writing = output, threading.Lock()
        self.folder: Path | None = None
        self.processes: dict[int, Process] = {}  # by number: the rank, or the first rank of a launcher
        self.readers: dict[int, list[threading.Thread]] = {}
        self.attended: set[int] = set()  # ranks that another starts, and that have not ended
        self.gone = False

    def say(self, **message: Any) -> None:
        line = MARK + json.dumps(message) + "\n"
        try:
            with self.writing:
                self.output.write(line.encode())
                self.output.flush()
        except OSError:
            self.gone = True

    # --- what the controller asks --------------------------------------------------------------------------------

    def do(self, message: dict[str, Any]) -> None:
        """Carry out one message. What has an answer gives one."""
        name = message.pop("do")
        if name in facts.QUESTIONS:
            self.say(answer=facts.QUESTIONS[name](**message))
        elif name in ("start", "attend"):
            try:
                (self.start if name == "start" else self.attend)(**message)
                self.say(answer={})
            except OSError as error:
                self.say(answer={"error": str(error)})
        elif name == "signal":
            self.signal(message["number"])
        elif name == "kill":
            self.kill()

    def make_folder(self, token: str) -> Path:
        """A folder that this user alone may enter, under a name that all hosts know."""
        self.remove_folder()
        self.folder = facts.memory_folder() / f"distft-{token}"
        self.folder.mkdir(mode=0o700)
        return self.folder

    def remove_folder(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = None

    def own_variables(self, folder: Path) -> dict[str, str]:
        return {FOLDER: str(folder), STATUS_FOLDER: str(folder), PARENT: str(os.getpid())}

    def start(
        self, token: str, run_dir: str, cwd: str, variables: dict[str, str], commands: list[Any], ranks: list[int]
    ) -> None:
        """Start processes. Each command: its number (a rank), arguments, variables, whether its output is shown.
        `ranks`: those that a command starts which is a launcher of ranks itself."""
        facts.stop_listening()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        own = self.own_variables(self.make_folder(token))
        environment = {**os.environ, "PATH": path, **variables, **own}
        self.processes, self.readers, self.attended = {}, {}, set(ranks)
        for number, argv, its, shown in commands:
            with Path(run_dir, "logs", f"rank-{number}.log").open("ab") as log:
                process = subprocess.Popen(
                    argv, cwd=cwd, env={**environment, **its}, stdin=subprocess.DEVNULL, process_group=0,
                    stdout=subprocess.PIPE if shown else log, stderr=subprocess.PIPE if shown else subprocess.STDOUT,
                )  # fmt: skip
            self.processes[number] = process
            streams = [(process.stdout, 1), (process.stderr, 2)] if shown else []
            self.readers[number] = [self.thread(self.pass_on, stream, number) for stream, number in streams]

    def attend(self, token: str, variables: dict[str, str], ranks: list[int]) -> None:
        """Get ready for ranks that another starts here with `--environment=<folder>/environment.json`."""
        facts.stop_listening()
        folder = self.make_folder(token)
        self.processes, self.readers = {}, {}
        descriptor = os.open(folder / VARIABLES, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({**variables, **self.own_variables(folder)}, file)
        self.attended = set(ranks)

    def thread(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        return thread

    def pass_on(self, stream: IO[bytes], number: int) -> None:
        while text := os.read(stream.fileno(), 1 << 16):
            self.say(output=number, text=text.decode("latin-1"))

    # --- what runs here -------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Report what has ended since the last look."""
        for rank, left in self.ended_ranks():
            self.say(ended=rank, code=left, time=time.time())
        for number, process in list(self.processes.items()):
            code = process.poll()
            if code is None:
                continue
            for reader in self.readers[number]:
                reader.join(1.0)  # what it said last comes before its end; a grandchild may hold the pipe open
            if code < 0:
                end_group(process.pid)
            del self.processes[number]
            self.say(left=number, code=code, time=time.time())

    def ended_ranks(self) -> list[tuple[int, int]]:
        """Ranks of a launcher that have ended, with the exit code that they left; -6 (SIGABRT) where they left none:
        they were killed, by whom cannot be known, since a launcher ends the others of a rank that failed."""
        if self.folder is None or not self.attended:
            return []
        pids = numbers_in(self.folder, "pid")
        codes = numbers_in(self.folder, "exit")
        if self.attended <= set(pids):
            (self.folder / VARIABLES).unlink(missing_ok=True)  # all have read it
        found = []
        for rank in sorted(self.attended & set(pids)):
            if not facts.is_running(pids[rank]):
                found.append((rank, codes.get(rank, -signal.SIGABRT)))
        self.attended -= {rank for rank, _ in found}
        return found

    def ranks(self) -> dict[int, int]:
        """Process ids of ranks under a launcher."""
        return numbers_in(self.folder, "pid") if self.folder is not None else {}

    def signal(self, number: int) -> None:
        """To the ranks themselves: launchers lose signals."""
        pids = list(self.ranks().values()) or [process.pid for process in self.processes.values()]
        for pid in pids:
            if facts.is_running(pid):
                os.kill(pid, number)

    def kill(self) -> None:
        """End what is left of this run, known by its process ids alone."""
        pids = [pid for pid in self.ranks().values() if facts.is_running(pid)]
        launchers = {launcher for pid in pids if (launcher := facts.launcher_of(pid))} if self.attended else set()
        for pid in [*launchers, *pids]:
            with_no_error(os.kill, pid, signal.SIGKILL)
        for process in self.processes.values():
            end_group(process.pid)
        for rank in sorted(self.attended - set(self.ranks())):  # never started
            self.say(ended=rank, code=-signal.SIGKILL, time=time.time())
        self.attended &= set(self.ranks())

    def abandon(self) -> NoReturn:
        """The controller is gone: ranks save and end, what does not is killed, nothing is left behind."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline and self.runs():
            time.sleep(0.1)
        self.kill()
        self.remove_folder()
        os._exit(0)

    def runs(self) -> bool:
        alive = any(process.poll() is None for process in self.processes.values())
        return alive or any(facts.is_running(pid) for pid in self.ranks().values())


def end_group(pid: int) -> None:
    with_no_error(os.killpg, pid, signal.SIGKILL)


def with_no_error(call: Callable[[int, int], None], pid: int, number: int) -> None:
    try:
        call(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def listen(messages: queue.Queue[dict[str, Any] | None]) -> None:
    """Put what the controller says into the queue; None once it is gone."""
    kept, heard = b"", time.monotonic()
    while time.monotonic() - heard < SILENT_SECONDS:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        read = os.read(0, 1 << 16)
        if not read:
            break
        heard = time.monotonic()
        *lines, kept = (kept + read).split(b"\n")
        for line in lines:
            if line.strip():
                messages.put(json.loads(line))
    messages.put(None)


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints does not come between our lines
    node = Node(output)
    node.say(answer={})
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    node.thread(listen, messages)
    while True:
        try:
            message = messages.get(timeout=PASS_SECONDS)
        except queue.Empty:
            message = {}
        if message is None or node.gone:
            node.abandon()
        if message.get("do") == "leave":
            node.kill()
            node.remove_folder()
            return
        if "do" in message:
            node.do(message)
        node.look()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
