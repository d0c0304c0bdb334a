"""Signs of life: where every rank is, in memory that its host can read without asking it.

Training writes its place into mapped memory with `mark`: no system call, no lock. The thread of `distft.pulse` adds
what costs more and publishes all of it for other hosts; `distft.launch.stall` reads and judges.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = (
    "start", "data", "forward", "backward", "optimizer step", "agreement", "record", "evaluation", "checkpoint",
    "final", "closing", "end",
)  # fmt: skip
INDEX = {phase: index for index, phase in enumerate(PHASES)}
TICK_SECONDS = 0.5  # between looks of the second thread
ANSWER_SECONDS = 3.0  # without a tick of the second thread, before a rank counts as one that does not answer

# rank, number of ranks, process id, host, machine
HEADER, HEADER_AT = struct.Struct("<qqq64s64s"), 0
# marks so far (twice: a reader sees a half-written mark), step, phase, steps begun, collectives, monotonic, wall clock
MARK, MARK_AT = struct.Struct("<qqqqqddq"), 256
# moments of the last beat of the training thread, and of a thread that works beside it
ALIVE, ALIVE_AT, BESIDE_AT = struct.Struct("<d"), 384, 392
# ticks, moment, moment at which a collective was last seen to start, number of groups, collectives of each, place
NUM_GROUPS = 16
TICK, TICK_AT = struct.Struct(f"<qddq{NUM_GROUPS}q256sq"), 448
SIZE = 1024

BESIDE = "checkpoint"  # description of the process group over which the thread beside training talks

MAIN = threading.main_thread().ident


@dataclass(frozen=True)
class Beat:
    """One rank, as its memory or its publication shows it."""

    rank: int
    size: int
    pid: int
    host: str
    machine: str  # whose process ids these are, see `this_machine`
    number: int  # marks so far: how far the rank is in the program that all ranks go through alike
    step: int
    phase: str
    steps: int  # begun by this process
    collectives: tuple[int, ...]  # started by training, by process group in the order in which groups were made
    age: float  # seconds since the rank last moved
    answers: bool = True  # its second thread is alive: the process runs, and its interpreter is not held
    where: str = ""  # the line of code at which it stands, once it stands
    state: str = ""  # of the process, in psutil's words, or "gone"; empty where it cannot be known

    @property
    def ended(self) -> bool:
        return self.phase == "end"

    @property
    def num_collectives(self) -> int:
        return sum(self.collectives)


def this_machine() -> str:
    """A name for the kernel and the process ids that this process sees: containers on one host have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:18]} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def memory_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.beat"


class Heartbeat:
    """This rank's own. `path`: a file that others on this host may read; None: memory of this process alone."""

    def __init__(self, path: Path | None, rank: int, size: int) -> None:
        self.rank = rank
        if path is None:
            self.memory = mmap.mmap(-1, SIZE)
        else:
            with open(path, "w+b") as file:
                file.truncate(SIZE)
                self.memory = mmap.mmap(file.fileno(), SIZE)
        self.number = self.step = self.steps = self.ticks = 0
        self.phase = PHASES[0]
        self.marked = self.moved = 0.0
        self.counted: list[int] = []
        host, machine = socket.gethostname().encode()[:64], this_machine().encode()[:64]
        HEADER.pack_into(self.memory, HEADER_AT, rank, size, os.getpid(), host, machine)

    def mark(self, phase: str, step: int | None = None) -> None:
        """Training goes over to `phase`. All ranks make the same marks in the same order."""
        if step is not None:
            self.step = step
        if phase == "data":
            self.steps += 1
        self.phase = phase
        self.number = number = self.number + 1
        self.marked = now = time.monotonic()
        place = (number, self.step, INDEX[phase], self.steps, world_collectives())
        MARK.pack_into(self.memory, MARK_AT, *place, now, time.time(), number)

    def beat(self) -> None:
        """A long phase goes on; called from inside it, on whichever thread does its work."""
        at = ALIVE_AT if threading.get_ident() == MAIN else BESIDE_AT
        ALIVE.pack_into(self.memory, at, time.monotonic())

    def tick(self, collectives: Sequence[int], where: Callable[[], str]) -> None:
        """The second thread's part. `where`: asked once training has not moved for a while."""
        now = time.monotonic()
        groups = list(collectives)[:NUM_GROUPS]
        if len(groups) < len(self.counted):  # groups that a rank has left still count
            groups = self.counted
        if groups != self.counted:
            self.counted, self.moved = groups, now
        place = where() if now - max(self.marked, self.moved) > 2 * TICK_SECONDS else ""
        self.ticks += 1
        filled = groups + [0] * (NUM_GROUPS - len(groups))
        TICK.pack_into(
            self.memory, TICK_AT, self.ticks, now, self.moved, len(groups), *filled, place.encode()[:256], self.ticks
        )

    def look(self) -> Beat | None:
        return read_memory(self.memory, time.monotonic())


def world_collectives() -> int:
    """Collectives that this rank has started on the group of all ranks; torch counts them under gloo and NCCL."""
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")  # importing torch is for others to do
    group = c10d and c10d.GroupMember.WORLD
    return int(group._get_sequence_number_for_group()) if group is not None else 0


def read_memory(memory: bytes | mmap.mmap, now: float) -> Beat | None:
    """What the memory of a rank on this host says at the monotonic time `now`; None before its first mark."""
    rank, size, pid, host, machine = HEADER.unpack_from(memory, HEADER_AT)
    number, step, phase, steps, collectives, marked, _, again = MARK.unpack_from(memory, MARK_AT)
    ticks, ticked, moved, num_groups, *rest, ticks_again = TICK.unpack_from(memory, TICK_AT)
    if not number or number != again or ticks != ticks_again:
        return None
    # The mark is younger than the tick where the rank was stopped between them.
    groups = (max(collectives, rest[0]), *rest[1:num_groups])
    last = max(marked, moved, ALIVE.unpack_from(memory, ALIVE_AT)[0])
    if PHASES[phase] == "checkpoint":  # training waits for the thread that writes
        last = max(last, ALIVE.unpack_from(memory, BESIDE_AT)[0])
    return Beat(
        rank, size, pid, text_of(host), text_of(machine), number, step, PHASES[phase], steps, groups,
        age=max(0.0, now - last), answers=now - max(ticked, marked) < ANSWER_SECONDS, where=text_of(rest[NUM_GROUPS]),
    )  # fmt: skip


def text_of(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


def read_file(path: Path) -> Beat | None:
    """The beat of a rank on this host. None where there is none yet."""
    for _ in range(10):  # the rank may be writing: two readings alike are a whole one
        try:
            first, second = path.read_bytes(), path.read_bytes()
        except OSError:
            return None
        if first == second and len(first) == SIZE:
            return read_memory(first, time.monotonic())
    return None


_own: Heartbeat | None = None


def take(heartbeat: Heartbeat | None) -> None:
    """From now on `mark` and `beat` mean this one; None: none."""
    global _own
    _own = heartbeat


def mark(phase: str, step: int | None = None) -> None:
    """This rank enters `phase`, one of PHASES, of `step` if that changes. Without a heartbeat nothing happens."""
    if _own is not None:
        _own.mark(phase, step)


def beat() -> None:
    """This rank is still at it: called from inside whatever may take longer than `guard.stall_seconds`."""
    if _own is not None:
        _own.beat()
