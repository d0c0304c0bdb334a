"""How the ranks agree about a checkpoint: all go on or all raise, on whichever thread they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from distft.errors import UserMistake
from distft.world import World


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

    def on_main(self, action: Callable[[], Any]) -> None:
        """Run on rank 0; the others wait for it, and where it raises, all ranks raise.

        Raises:
            UserMistake: the disk refused.
            RuntimeError: anything else.
        """
        problem: tuple[str, bool] | None = None
        if self.world.is_main:
            try:
                action()
            except OSError as error:
                problem = f"{error.strerror}: {error.filename}", True
            except Exception as error:  # told on every rank instead of leaving the others in a collective
                problem = f"{type(error).__name__}: {error}", False
        problem = self.gather(problem)[0]
        if problem is None:
            return
        text, of_the_disk = problem
        if of_the_disk:
            raise UserMistake(
                f"The checkpoint could not be written ({text}). Set run.dir to another disk, then resume."
            )
        raise RuntimeError(text)
