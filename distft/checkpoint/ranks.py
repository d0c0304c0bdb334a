"""How the ranks agree about a checkpoint: all go on or all raise, on whichever thread they are."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from distft.errors import NegativeVerdict, Stop, UserMistake
from distft.world import World

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(UserMistake):
    """No room, or no quota, for a checkpoint; `checkpoint.on_full` says what follows."""


@dataclass(frozen=True)
class Problem:
    """What a rank met, in a form that travels to the others."""

    kind: type[Exception]  # DiskFull, UserMistake (the disk refuses), NegativeVerdict (it lies) or RuntimeError
    text: str

    @classmethod
    def of(cls, error: Exception) -> Problem:
        if isinstance(error, OSError):
            return cls(DiskFull if error.errno in FULL else UserMistake, f"{error.strerror}: {error.filename}")
        if isinstance(error, DiskFull | NegativeVerdict):
            return cls(type(error), str(error))
        kind = UserMistake if isinstance(error, Stop) else RuntimeError
        return cls(kind, str(error) if kind is UserMistake else f"{type(error).__name__}: {error}")


def gravest(problems: list[Problem]) -> type[Exception]:
    """The kind that all ranks raise where several were met."""
    order = (RuntimeError, NegativeVerdict, UserMistake, DiskFull)
    return min((problem.kind for problem in problems), key=order.index)


@dataclass(frozen=True)
class Ranks:
    """The ranks over one process group. One thread at a time may talk over a group, so a thread has a group its own."""

    world: World
    group: dist.ProcessGroup | None = None  # None: the one that training uses too

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order of rank."""
        if self.world.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def first(self, value: Any) -> Any:
        """Rank 0's `value`: what a folder holds, network file systems do not show to all ranks at the same moment."""
        return self.gather(value if self.world.is_main else None)[0]

    def on_main(self, action: Callable[[], Any]) -> None:
        """Run on rank 0; the others wait for it, and where it raises, all ranks raise.

        Raises:
            DiskFull, UserMistake: the disk refused.
            NegativeVerdict: it does not hold what was written.
            RuntimeError: anything else.
        """
        problem: Problem | None = None
        if self.world.is_main:
            try:
                action()
            except Exception as error:  # told on every rank instead of leaving the others in a collective
                problem = Problem.of(error)
        problem = self.first(problem)
        if problem is not None:
            raise problem.kind(problem.text)
