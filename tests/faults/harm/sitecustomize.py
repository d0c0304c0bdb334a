"""Harm from outside: a folder with this file on PYTHONPATH changes one rank of a run that knows nothing of it.

HARM names one or several, HARM_RANK the rank. loader: making the batch of the sixth step takes for ever. collective:
the rank sleeps instead of joining the sum behind the sixth step's record. evaluation: each of an evaluation's steps
takes SECONDS. checkpoint: each tensor that is written takes TENSOR_SECONDS.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STEP = 5  # counted from 0
SECONDS = 2.5
TENSOR_SECONDS = 0.2


def sleeping_loader(module: Any) -> None:
    before = module.Plan.step

    def step(self: Any, index: int) -> Any:
        if index == STEP:
            time.sleep(100_000)
        return before(self, index)

    module.Plan.step = step


def missing_collective(module: Any) -> None:
    before, calls = module.sum_over, [0]

    def sum_over(*given: Any) -> Any:
        if calls[0] == STEP:
            time.sleep(100_000)
        calls[0] += 1
        return before(*given)

    module.sum_over = sum_over


def slow_evaluation(module: Any) -> None:
    before = module.Plan.eval_steps

    def eval_steps(self: Any) -> Any:
        for step in before(self):
            time.sleep(SECONDS)
            yield step

    module.Plan.eval_steps = eval_steps


def slow_disk(module: Any) -> None:
    @contextmanager
    def opened(path: Any, mode: str) -> Iterator[Any]:
        with open(path, mode) as file:
            yield Slow(file) if "w" in mode else file

    module.open = opened  # found before the builtin one


class Slow:
    """A file whose writing takes its time."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> Any:
        time.sleep(TENSOR_SECONDS)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


HARMS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "loader": ("distft.data.batches", sleeping_loader),
    "collective": ("distft.loop", missing_collective),
    "evaluation": ("distft.data.batches", slow_evaluation),
    "checkpoint": ("distft.checkpoint.ranges", slow_disk),
}


if "HARM" in os.environ and os.environ.get("RANK", "0") == os.environ["HARM_RANK"]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.faults.changing import change_on_import

    change_on_import(HARMS[word] for word in os.environ["HARM"].split(","))
    del sys.path[0]
