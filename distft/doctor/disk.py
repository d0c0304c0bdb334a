"""The file systems that a run writes to: are they quick, sound and shared?"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.doctor.verdict import FAILS, OK, WARN, Verdict, worst

PIECE = 4 << 20
LARGEST = 128 << 20  # bytes written to measure the speed
WRITE_SECONDS = 2.0
SLOW = 50e6  # bytes a second: a checkpoint of 7 billion parameters and their moments would take half an hour
LITTLE = 1 << 30  # bytes
FEW_FILES = 1000


@dataclass(frozen=True)
class DiskFacts:
    """What one folder's file system did. Speeds in bytes a second, with fsync and from the disk."""

    folder: str
    written: float
    read: float
    free: int  # bytes
    free_files: int | None  # None: the file system does not count them
    renames: bool = True  # a file and a folder take a name at once, and an old file under it is gone
    locks: bool = True  # a second flock is refused
    drops: bool = True  # its cached pages can be given up (posix_fadvise), so that a check reads the disk
    sound: bool = True  # what was read back is what was written


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    while not path.is_dir():
        path = path.parent
    return path


@dataclass(frozen=True)
class Place:
    """What lies there, the knob that says where, and the path."""

    what: str
    knob: str
    path: Path


def look(places: Sequence[Place]) -> list[Verdict]:
    """Try the file systems on which these are or will be, each once."""
    found: list[Verdict] = []
    seen: dict[int, Place] = {}
    for place in places:
        folder = existing(place.path)
        try:
            writable(folder)
            same = seen.setdefault(folder.stat().st_dev, place)
            if same is place:
                found += judge(place, probe(folder))
            else:
                found.append(Verdict(place.what, OK, f"{folder} is on the file system of the {same.what}"))
        except OSError as error:
            cure = f"Free space or mend its rights, or set {place.knob}."
            found.append(Verdict(place.what, FAILS, f"{folder} cannot be written: {error.strerror}", cure))
    return found


def writable(folder: Path) -> None:
    """
    Raises:
        OSError: a file cannot be made there.
    """
    with tempfile.NamedTemporaryFile(prefix=".distft-doctor-", dir=folder) as file:
        file.write(b"written")
        file.flush()
        os.fsync(file.fileno())


def probe(folder: Path) -> DiskFacts:
    """Write, sync, read, rename and lock in a new folder there, which is removed again.

    Raises:
        OSError: the file system refuses it.
    """
    with tempfile.TemporaryDirectory(prefix=".distft-doctor-", dir=folder) as room:
        path = Path(room, "speed")
        written, num_bytes, digest = write(path)
        drops = give_up_pages(path)
        read, found = read_back(path, num_bytes)
        renames, locks = try_renames(Path(room)), try_locks(Path(room, "lock"))
    status = os.statvfs(folder)
    return DiskFacts(
        folder=str(folder),
        written=written,
        read=read,
        free=shutil.disk_usage(folder).free,
        free_files=status.f_favail if status.f_files else None,
        renames=renames,
        locks=locks,
        drops=drops,
        sound=found == digest,
    )


def write(path: Path) -> tuple[float, int, bytes]:
    """Random bytes for WRITE_SECONDS at most: bytes a second with fsync, how many, and their digest."""
    piece, digest, num_bytes = os.urandom(PIECE), hashlib.blake2b(), 0
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while num_bytes < LARGEST and time.perf_counter() - started < WRITE_SECONDS:
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
            digest.update(piece)
            num_bytes += len(piece)
        os.fsync(file.fileno())
    return num_bytes / (time.perf_counter() - started), num_bytes, digest.digest()


def give_up_pages(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
    return True


def read_back(path: Path, num_bytes: int) -> tuple[float, bytes]:
    """Bytes a second, and the digest of what was read."""
    digest, started = hashlib.blake2b(), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return num_bytes / (time.perf_counter() - started), digest.digest()


def try_renames(room: Path) -> bool:
    """As checkpoints are published: a folder under its final name, a file over the one before."""
    (room / "step.tmp").mkdir()
    (room / "step.tmp" / "file").write_text("new")
    (room / "step.tmp").rename(room / "step")
    (room / "latest").write_text("old")
    (room / "latest.tmp").write_text("new")
    (room / "latest.tmp").replace(room / "latest")
    handle = os.open(room, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    moved = (room / "step" / "file").read_text() == "new" and (room / "latest").read_text() == "new"
    return moved and not (room / "step.tmp").exists() and not (room / "latest.tmp").exists()


def try_locks(path: Path) -> bool:
    """Whether a lock keeps another opening of the file out."""
    with path.open("w") as first, path.open("r+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def judge(place: Place, facts: DiskFacts) -> list[Verdict]:
    found = []

    def tell(state: str, said: str, cure: str) -> None:
        found.append(Verdict(place.what, state, f"{facts.folder} {said}", cure))

    elsewhere = f"Set {place.knob} to another file system."
    if not facts.sound:
        tell(FAILS, "does not give back what was written", f"Do not use this disk. {elsewhere}")
    if not facts.renames:
        tell(FAILS, "does not rename at once, so a checkpoint could be seen half written", elsewhere)
    if not facts.locks:
        tell(WARN, "keeps no locks (flock), so two runs in one folder are told late", elsewhere)
    if not facts.drops:
        tell(WARN, "does not give up cached pages, so checkpoints are not verified from the disk", elsewhere)
    if facts.free < LITTLE:
        tell(WARN, f"has {facts.free / 1e6:.0f} MB free", f"Free space there. {elsewhere}")
    if facts.free_files is not None and facts.free_files < FEW_FILES:
        tell(FAILS, f"takes {facts.free_files} more files", f"Delete files there. {elsewhere}")
    if min(facts.written, facts.read) < SLOW:
        tell(WARN, f"is slow: written at {speed(facts.written)}, read at {speed(facts.read)}", elsewhere)
    good = (
        f"{facts.folder}: written at {speed(facts.written)} with fsync, read at {speed(facts.read)}, renames, locks, "
    )
    return worst(place.what, found, f"{good}{facts.free / 1e9:.0f} GB free")


def speed(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.0f} MB/s"
