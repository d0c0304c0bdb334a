"""Which devices each of several jobs on this machine has to itself. Pure but for `here`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from distft.errors import UserMistake
from distft.launch.topology import count_gpus


@dataclass(frozen=True)
class Lease:
    """The devices of one job. `cores`: those that its processes are kept to; empty: all."""

    environment: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()

    def __str__(self) -> str:
        gpus = self.environment.get("CUDA_VISIBLE_DEVICES")
        if gpus is not None:
            return f"GPU {gpus}"
        return f"core{'s' if len(self.cores) > 1 else ''} {','.join(map(str, self.cores))}"


def leases(jobs: int | str, ranks: int | str, gpus: Sequence[str], cores: Sequence[int]) -> list[Lease]:
    """The devices divided among `jobs` jobs of `ranks` ranks each.

    Args:
        jobs: auto: as many as have room.
        ranks: auto: without GPUs one; else as many GPUs as a job's share is, one with jobs=auto.
        gpus: as CUDA_VISIBLE_DEVICES names them.
        cores: that this process may run on.

    Raises:
        UserMistake: there is no room for so many.
    """
    each = ranks if isinstance(ranks, int) else 1
    devices = len(gpus) or len(cores)
    most = devices // each
    count = max(1, most) if jobs == "auto" else int(jobs)
    if count > max(1, most):
        what = f"{devices} {'GPU' if gpus else 'core'}{'s' if devices > 1 else ''}"
        raise UserMistake(
            f"sweep.jobs={count} jobs of {each} rank{'s' if each > 1 else ''} do not fit on {what} of this machine. "
            f"Set sweep.jobs={max(1, most)} (or auto), or lower launch.ranks."
        )
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, len(cores) // (count * each)))}
    if not gpus:
        share = max(1, len(cores) // count)
        return [Lease({}, tuple(cores[number * share : (number + 1) * share])) for number in range(count)]
    share = each if isinstance(ranks, int) or jobs == "auto" else len(gpus) // count
    return [
        Lease({"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * share : (number + 1) * share]), **threads})
        for number in range(count)
    ]


def here(jobs: int | str, ranks: int | str) -> list[Lease]:
    """The leases on this machine.

    Raises:
        UserMistake: there is no room for so many.
    """
    count = count_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [word.strip() for word in visible.split(",")][:count] if visible else list(map(str, range(count)))
    return leases(jobs, ranks, gpus, sorted(os.sched_getaffinity(0)))
