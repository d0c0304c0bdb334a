"""Breaks one thing in a process: Python imports this file at its start where the folder stands on PYTHONPATH.

$BROKEN names what is broken, by the names of `BREAKS`, with commas between.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def naive_packing(trainee: ModuleType) -> None:
    """Documents share a row and nothing says where they begin."""
    trainee.Trainee.boundaries = lambda self, batch: {}  # type: ignore[attr-defined]


def mean_of_means(loop: ModuleType) -> None:
    """Every micro-batch counts alike, whatever number of supervised tokens it has."""
    original = loop.Fit.step

    def step(self: Any, step: Any) -> Any:
        parts = len(step.micro_batches) * self.world.data_size
        forward = self.strategy.forward

        def scaled(request: Any) -> Any:
            return forward(dataclasses.replace(request, scale=1 / max(1, request.batch.num_supervised) / parts))

        self.strategy.forward = scaled
        try:
            return original(self, step)
        finally:
            del self.strategy.forward

    loop.Fit.step = step  # type: ignore[attr-defined]


def lost_random_state(loop: ModuleType) -> None:
    """Random numbers depend on how many were drawn before, and nobody saves that."""
    loop.seed_everything = lambda seed: None  # type: ignore[attr-defined]


def zeroed_adapter(final: ModuleType) -> None:
    """What is written of the adapters does nothing."""
    original = final.write_sharded

    def write_sharded(folder: Any, tensors: Any, *args: Any, **words: Any) -> Any:
        def zeroed() -> Iterator[tuple[str, Any]]:
            for name, tensor in tensors:
                yield name, tensor * 0 if "lora_B" in name else tensor

        return original(folder, zeroed(), *args, **words)

    final.write_sharded = write_sharded  # type: ignore[attr-defined]


BREAKS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "naive packing": ("distft.objective.trainee", naive_packing),
    "mean of means": ("distft.loop", mean_of_means),
    "lost random state": ("distft.loop", lost_random_state),
    "zeroed adapter": ("distft.model.final", zeroed_adapter),
}


if os.environ.get("BROKEN"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.faults.changing import change_on_import

    change_on_import(BREAKS[name] for name in os.environ["BROKEN"].split(","))
    del sys.path[0]
