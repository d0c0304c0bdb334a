"""One launch at a time in a run folder: `lock.json` says who, and a launch that died does not block the next.

The process that makes or enters a run folder (the controller; rank 0 where a foreign launcher started the ranks) is the
*holder*. It writes down its host, process and start, and renews the file's time every few seconds. It and all ranks of
its launch also keep a shared flock on the file, so that a folder is free only when the last of them has ended.

A holder on this machine is known to be gone when its process is; its lock is taken over at once. Of another machine
only the file's time tells: the lock is watched, and refused when it is renewed, taken over when it is old. Where a file
system keeps no flocks among nodes, that is all there is. The file appears by link(2), which one alone can win, also on
network file systems.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distft.errors import UserMistake

LOCK = "lock.json"
LAUNCH = "DISTFT_LOCK"  # environment: token and folder of the lock of the launch that this process belongs to
RENEW_SECONDS = 5.0
OLD_SECONDS = 60.0  # without a sign of life from another machine
NAMELESS = "a process that left no name"  # its lock cannot be read
LEAVE_SECONDS = 60.0  # what the ranks of a launch whose controller was killed get to end: they save first


@dataclass(frozen=True)
class Holder:
    """Who wrote a lock. A process is one start time on one boot in one namespace of process ids."""

    token: str
    host: str
    pid: int
    start: str
    machine: str
    since: str

    @classmethod
    def here(cls) -> Holder:
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(secrets.token_hex(8), socket.gethostname(), pid, started(pid), machine(), since)

    @classmethod
    def read(cls, text: str) -> Holder | None:
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def is_gone(self) -> bool:
        """Certain only on the same machine."""
        return self.machine == machine() and started(self.pid) != self.start

    @property
    def is_here(self) -> bool:
        return self.machine == machine() and not self.is_gone

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def machine() -> str:
    """This boot of this machine, and the namespace in which its process ids hold."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> str:
    """When a process of this machine started, in ticks of this boot; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class RunLock:
    """The lock as one process has it, as its holder or as a member of the holder's launch."""

    def __init__(self, path: Path, holder: Holder, holds: bool) -> None:
        self.path, self.holder, self.holds = path, holder, holds
        self.descriptor = os.open(path, os.O_RDWR)
        flock(self.descriptor, fcntl.LOCK_SH)
        self.ended = threading.Event()
        if holds:
            os.environ[LAUNCH] = f"{holder.token}:{path.parent}"
            threading.Thread(target=self.renew, name="lock", daemon=True).start()

    def renew(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)

    def release(self) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        if self.holds:
            os.environ.pop(LAUNCH, None)
            found = read(self.path)
            if found and found.token == self.holder.token:
                self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


HELD: list[RunLock] = []  # by this process


def take(folder: Path, say: Callable[[str], None] = print) -> None:
    """Hold the run folder, until `release` or the end of this process; join in where its own launch holds it.

    Raises:
        UserMistake: another launch holds it.
    """
    path = folder / LOCK
    if mine := member_of(folder):
        found = read(path)
        if found is None or found.token != mine:
            raise UserMistake(taken_over(folder, found))
        HELD.append(RunLock(path, found, holds=False))
        return
    holder = Holder.here()
    draft = folder / f"{LOCK}.{holder.token}"
    try:
        draft.write_text(json.dumps(dataclasses.asdict(holder)))
        while not publish(draft, path):
            take_over(path, draft, say)
    except OSError as error:
        raise UserMistake(f"run.dir={folder} refuses files: {error.strerror}. Name one that you may write.") from None
    finally:
        draft.unlink(missing_ok=True)
    if not HELD:
        atexit.register(release)
    HELD.append(RunLock(path, holder, holds=True))


def join(folder: Path) -> None:
    """Stay in the folder that another rank of the same launch, started by hand, has taken."""
    found = read(folder / LOCK)
    if found is not None:
        HELD.append(RunLock(folder / LOCK, found, holds=False))


def release() -> None:
    """Leave all run folders that this process holds."""
    while HELD:
        HELD.pop().release()


def check_held(folder: Path) -> None:
    """
    Raises:
        UserMistake: another launch has taken the folder over, because this one gave no sign of life for long.
    """
    mine, found = member_of(folder), read(folder / LOCK)
    if mine and found and found.token != mine:
        raise UserMistake(taken_over(folder, found))


def member_of(folder: Path) -> str | None:
    """The token of this process's launch, if that holds `folder`."""
    token, _, place = os.environ.get(LAUNCH, "").partition(":")
    return token if token and place == str(folder) else None


def read(path: Path) -> Holder | None:
    try:
        return Holder.read(path.read_text())
    except OSError:
        return None


def publish(draft: Path, path: Path) -> bool:
    """Make the lock appear with its content; False where there is one."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as file:
                file.write(draft.read_text())
        except FileExistsError:
            return False
    return True


def take_over(path: Path, draft: Path, say: Callable[[str], None]) -> None:
    """Remove the lock at `path` once its launch is gone for certain, or old and of another machine.

    Raises:
        UserMistake: its launch lives.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        holder = Holder.read(os.read(descriptor, 1 << 16).decode(errors="replace"))
        if holder is not None and holder.is_here:
            raise UserMistake(in_use(path, str(holder), f"stop it with `kill {holder.pid}`"))
        if holder is None or not holder.is_gone:
            silent = watched(path, draft, holder, say)
            note = f"has given no sign of life for {silent:.0f} s"
        else:
            note = "is gone"
        if not alone(descriptor, path, holder, say):
            pids = ", ".join(map(str, flocked_by(os.fstat(descriptor).st_ino))) or "on another machine"
            raise UserMistake(
                in_use(path, f"ranks (process {pids}) of {holder or NAMELESS}, which {note}", "stop them")
            )
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:  # else another launch was faster
                os.unlink(path)
                say(f"{path.parent} was held by {holder or NAMELESS}, which {note}: taken over")
    finally:
        os.close(descriptor)


def watched(path: Path, draft: Path, holder: Holder | None, say: Callable[[str], None]) -> float:
    """Wait until a lock of another machine is old. Returns the seconds since it was renewed.

    Both times are the file system's, so that clocks of machines do not matter.

    Raises:
        UserMistake: it was renewed.
    """
    first, told = path.stat().st_mtime, False
    while True:
        os.utime(draft)
        now = draft.stat().st_mtime
        with path.open("rb") as file:  # opening asks a network file system's server anew
            renewed = os.fstat(file.fileno()).st_mtime
        if renewed != first:
            raise UserMistake(in_use(path, str(holder or NAMELESS), "stop it there"))
        if now - renewed >= OLD_SECONDS:
            return now - renewed
        if not told:
            ago = max(0.0, now - renewed)
            say(f"{path.parent} is held by {holder or NAMELESS}, seen {ago:.0f} s ago: waiting for a sign of life")
            told = True
        time.sleep(0.5)


def alone(descriptor: int, path: Path, holder: Holder | None, say: Callable[[str], None]) -> bool:
    """Wait until no rank of the dead launch is left, and keep others from asking the same."""
    deadline, told = time.monotonic() + LEAVE_SECONDS, False
    while not flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() > deadline:
            return False
        if not told:
            say(f"{path.parent} was held by {holder or NAMELESS}, which is gone: waiting for its ranks to end")
            told = True
        time.sleep(0.1)
    return True


def flock(descriptor: int, kind: int) -> bool:
    """Whether it was had; a file system that has none counts as one where nobody else holds it."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def flocked_by(inode: int) -> list[int]:
    """Processes of this machine that hold a flock on the file."""
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    return sorted({int(words[4]) for words in lines if words[1] == "FLOCK" and words[5].endswith(f":{inode}")})


def in_use(path: Path, holder: str, cure: str) -> str:
    return (
        f"run.dir={path.parent} is in use by {holder}. Two launches in one folder would mix their checkpoints: wait "
        f"for its end, {cure}, or name another run.dir. If nothing runs there for certain, delete {path}."
    )


def taken_over(folder: Path, holder: Holder | None) -> str:
    by = f" by {holder}" if holder else ""
    return (
        f"run.dir={folder} was taken over{by}, since this launch had given no sign of life. It ends here, so that the "
        "two do not mix; what goes on there has its last checkpoint."
    )
