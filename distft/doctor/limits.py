"""What the system allows a rank: open files, processes, locked memory, sizes."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from distft.doctor.verdict import FAILS, WARN, Verdict, worst

FILES_OF_A_RANK = 192  # a tiny run under ZeRO-2 has 90 open: libraries, data, sockets, logs
GROUPS_OF_A_RUN = 4  # process groups with sockets to every other rank: world, agreement, checkpoints, the engine's
THREADS_OF_A_RANK = 64
SMALLEST_FILE = 1 << 30  # bytes that a weight file may well have
CURE = "Raise it with `ulimit -{letter}`, or for good in /etc/security/limits.conf (in Slurm: PropagateResourceLimits)."


@dataclass(frozen=True)
class Limits:
    """Soft limits of this process (infinite: none), and what makes them matter."""

    open_files: float
    processes: float
    file_size: float  # bytes
    address_space: float  # bytes
    locked: float  # bytes
    core: float  # bytes
    num_threads: int = 0  # of this user now
    has_infiniband: bool = False
    core_is_a_file: bool = False  # else a program or nothing takes it


def look(local_size: int, size: int) -> list[Verdict]:
    def soft(which: int) -> float:
        value = resource.getrlimit(which)[0]
        return math.inf if value == resource.RLIM_INFINITY else float(value)

    pattern = Path("/proc/sys/kernel/core_pattern")
    limits = Limits(
        open_files=soft(resource.RLIMIT_NOFILE),
        processes=soft(resource.RLIMIT_NPROC),
        file_size=soft(resource.RLIMIT_FSIZE),
        address_space=soft(resource.RLIMIT_AS),
        locked=soft(resource.RLIMIT_MEMLOCK),
        core=soft(resource.RLIMIT_CORE),
        num_threads=own_threads(),
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        core_is_a_file=pattern.exists() and not pattern.read_text().startswith("|"),
    )
    return judge(limits, local_size, size, os.geteuid() == 0)


def own_threads() -> int:
    user, count = os.geteuid(), 0
    for process in psutil.process_iter():
        try:
            count += process.num_threads() if process.uids().effective == user else 0
        except psutil.Error:
            continue
    return count


def judge(limits: Limits, local_size: int, size: int, is_root: bool = False) -> list[Verdict]:
    """Whether `local_size` ranks of `size` fit into these limits; root has none on processes."""
    found = []

    def tell(state: str, letter: str, said: str) -> None:
        found.append(Verdict("limits", state, said, CURE.format(letter=letter)))

    files = FILES_OF_A_RANK + GROUPS_OF_A_RUN * size
    if limits.open_files < 2 * files:
        state = FAILS if limits.open_files < files else WARN
        tell(state, "n", f"{limits.open_files:g} open files are allowed, and a rank of {size} may need {files}")
    threads = limits.num_threads + THREADS_OF_A_RANK * local_size
    if limits.processes < threads and not is_root:
        said = f"{limits.processes:g} processes and threads are allowed; with {local_size} ranks there may be {threads}"
        tell(FAILS, "u", said)
    if limits.file_size < SMALLEST_FILE:
        tell(FAILS, "f", f"a file may have {limits.file_size:g} bytes, less than the weights of most models")
    if limits.address_space < math.inf:
        tell(WARN, "v", f"a process may map {limits.address_space / 2**30:.1f} GiB; CUDA and mapped data take far more")
    if limits.has_infiniband and limits.locked < math.inf:
        tell(FAILS, "l", f"{limits.locked / 2**20:.0f} MiB may be locked, but InfiniBand pins its buffers")
    if limits.core > 0 and limits.core_is_a_file and size > 1:
        most = "" if math.isinf(limits.core) else f" of up to {limits.core / 2**30:.1f} GiB"
        tell(WARN, "c", f"each rank that crashes writes its memory to a core file{most}: 0 allows none")
    good = f"open files {shown(limits.open_files)}, processes {shown(limits.processes)}, locked memory "
    return worst("limits", found, good + shown(limits.locked, " bytes"))


def shown(value: float, unit: str = "") -> str:
    return "unlimited" if math.isinf(value) else f"{value:,.0f}{unit}"
