"""Harm from outside: a folder with this file on PYTHONPATH changes one rank of a run that knows nothing of it.

HARM names one or several, HARM_RANK the rank. loader: making the batch of the sixth step takes for ever. collective:
the rank sleeps instead of joining the sum behind the sixth step's record. evaluation: each of an evaluation's steps
takes SECONDS. checkpoint: each tensor that is written takes TENSOR_SECONDS.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
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


class Finder(importlib.abc.MetaPathFinder):
    """Changes modules as soon as they have been imported."""

    def __init__(self, changes: dict[str, list[Callable[[Any], None]]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in self.changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for change in self.changes[name]:
                change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "HARM" in os.environ and os.environ.get("RANK", "0") == os.environ["HARM_RANK"]:
    chosen: dict[str, list[Callable[[Any], None]]] = {}
    for word in os.environ["HARM"].split(","):
        target, change = HARMS[word]
        chosen.setdefault(target, []).append(change)
    sys.meta_path.insert(0, Finder(chosen))
