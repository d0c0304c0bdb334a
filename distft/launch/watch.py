"""Wait for the ranks of one start, pass signals on, end what is left, and say how it ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from distft import errors
from distft.launch import failure
from distft.launch.failure import DELIBERATE, End
from distft.launch.start import STATUS_FOLDER, Command, start
from distft.launch.stop import Signals, name_of
from distft.parent import PARENT

Process = subprocess.Popen[bytes]
Look = Callable[[], str | None]

CRASH_SECONDS = 6.0  # what the other ranks get to fail by themselves once one has crashed, then they are killed
STOP_SECONDS = 60.0  # the same after a deliberate end: rank 0 may still be writing a checkpoint or its tracker's files
LOOK_SECONDS = 0.5


class Waited(Protocol):
    """What is asked of a process, on whatever host it runs."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


@dataclass
class Watched:
    """How the processes of one start ended."""

    codes: list[int]
    seen: dict[int, float] = field(default_factory=dict)  # by rank, when its end was seen: seconds since 1970
    ended: set[int] = field(default_factory=set)  # ranks that were there when the rest was ended
    stalled: str | None = None  # what `look` said


def watch(
    processes: Sequence[Waited],
    signals: Signals,
    send: Callable[[int], None],
    kill: Callable[[], None],
    look: Look | None = None,
) -> Watched:
    """Wait for all processes.

    The first of each stop signal is passed on with `send`; one that asks to end at once ends everything. When one
    process has failed, the others get a few seconds to end by themselves: whoever waits for a dead rank never comes
    back. `look` is asked twice a second; the sentence that it may return is printed, and everything is ended.
    """
    watched = Watched([])
    deadline, next_look, passed_on = float("inf"), 0.0, 0
    while any(process.poll() is None for process in processes):
        for number in signals.received[passed_on:]:
            send(number)
            passed_on += 1
        if signals.at_once and not watched.ended:
            deadline = 0
        for rank, process in enumerate(processes):
            code = process.poll()
            if code is None or rank in watched.seen:
                continue
            watched.seen[rank] = time.time()
            if code and deadline == float("inf") and not watched.ended:
                orderly = code in DELIBERATE and code != errors.STALLED  # nobody comes back from a stall
                deadline = time.monotonic() + (STOP_SECONDS if orderly else CRASH_SECONDS)
        if look is not None and not watched.ended and time.monotonic() >= next_look:
            next_look = time.monotonic() + LOOK_SECONDS
            if sentence := look():
                watched.stalled = sentence
                say(sentence)
                deadline = 0
        if time.monotonic() > deadline:
            watched.ended |= {rank for rank, process in enumerate(processes) if process.poll() is None}
            kill()
            deadline = float("inf")
        time.sleep(0.05)
    watched.codes = [process.wait() for process in processes]
    for rank in range(len(processes)):
        watched.seen.setdefault(rank, time.time())
    return watched


def say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"distft: {text}\n")
    sys.stderr.flush()


def kill_groups(processes: list[Process]) -> None:
    """End what is still there, with its own children: each process leads its group."""
    end_groups([process for process in processes if process.poll() is None])


def end_groups(processes: list[Process]) -> None:
    """End these processes and their children, also those whose parent has been killed."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended: the run's exit code, the first cause of a failure, and what was said of it."""

    code: int
    cause: End | None = None
    sentence: str = ""


def run_direct(commands: list[Command], run_dir: Path, signals: Signals, look: Look | None = None) -> Ending:
    """Start the ranks ourselves and wait for their end. `signals` are being caught."""
    failure.forget(run_dir)
    processes = start(commands, run_dir / "logs", quiet=True, environment={PARENT: str(os.getpid())})

    def send(number: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    watched = watch(processes, signals, send, lambda: kill_groups(processes), look)
    end_groups([process for process, code in zip(processes, watched.codes, strict=True) if code < 0])
    ends = [
        End(rank, code, watched.seen[rank], socket.gethostname(), rank in watched.ended, failure.read(run_dir, rank))
        for rank, code in enumerate(watched.codes)
    ]
    return ending(ends, signals, watched.stalled, run_dir)


def run_launcher(command: Command, run_dir: Path, signals: Signals, status: Path, look: Look | None = None) -> Ending:
    """Start the ranks through deepspeed or torchrun and wait for their end.

    These lose signals and change exit codes, so each rank leaves its process id and its exit code in `status`: signals
    go to the ranks themselves, and their own codes make the run's.
    """
    failure.forget(run_dir)
    names = {PARENT: str(os.getpid()), STATUS_FOLDER: str(status)}
    processes = start([command], run_dir / "logs", quiet=False, environment=names)

    def send(number: int) -> None:
        for pid in numbers_in(status, "pid").values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill() -> None:
        send(signal.SIGKILL)
        kill_groups(processes)

    watched = watch(processes, signals, send, kill, look)
    if watched.codes == [0]:
        return Ending(errors.DONE)
    codes = numbers_in(status, "exit")
    # Who left no code was killed: by whom cannot be known here, the launcher ends the others of a rank that failed.
    ends = [
        End(rank, codes.get(rank, -signal.SIGABRT), watched.seen[0], failure=failure.read(run_dir, rank))
        for rank in numbers_in(status, "pid")
    ]
    return ending(ends, signals, watched.stalled, run_dir, launcher_failed=True)


def numbers_in(status: Path, kind: str) -> dict[int, int]:
    """Process ids or exit codes that ranks left behind, by rank."""
    found = {}
    for path in status.glob(f"rank-*.{kind}"):
        text = path.read_text()
        if text:
            found[int(path.stem.removeprefix("rank-"))] = int(text)
    return dict(sorted(found.items()))


def ending(
    ends: list[End], signals: Signals, stalled: str | None, run_dir: Path, launcher_failed: bool = False
) -> Ending:
    """The run's exit code from the ends of its ranks. What rank 0 has not said itself is said here."""
    if stalled:
        return Ending(errors.STALLED, None, stalled)
    if signals.at_once:
        names = " and ".join(name_of(number) for number in signals.received)
        sentence = f"Ended at once by a second {names}; what was saved before stays. Go on with resume={run_dir}."
        say(sentence)
        return Ending(errors.ENDED_AT_ONCE, None, sentence)
    cause = failure.first_cause(ends)
    if cause is None:
        return Ending(errors.BUG if launcher_failed else errors.DONE)
    sentence = f"{cause}."
    if cause.exit_code == errors.SAVED_AFTER_SIGNAL and cause.code < 0:
        say(f"{sentence} Training had not begun, so there is nothing to save.")
    elif cause.exit_code == errors.BUG or cause.code not in (end.code for end in ends if end.rank == 0):
        say(f"{sentence} Go on with resume={run_dir}." if cause.lost else f"{sentence}{last_words(cause, run_dir)}")
    return Ending(cause.exit_code, cause, sentence)


def last_words(cause: End, run_dir: Path) -> str:
    """The end of the log of a rank that has no terminal."""
    path = run_dir / "logs" / f"rank-{cause.rank}.log"
    tail = last_lines(path) if cause.rank != 0 and cause.code > 0 and not cause.lost else ""
    return f" The last lines of {path}:\n{tail}" if tail else ""


def last_lines(path: Path, count: int = 20) -> str:
    if not path.is_file():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
