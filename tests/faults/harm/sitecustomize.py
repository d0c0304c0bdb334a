"""Harm from outside: a folder with this file on PYTHONPATH changes one rank of a run that knows nothing of it.

HARM=loader: making the batch of step HARM_STEP takes for ever. HARM=collective: the rank sleeps instead of joining the
sum behind the record of step HARM_STEP. HARM=evaluation: each batch of an evaluation takes HARM_SECONDS. HARM_RANK
says which rank, HARM_STEP counts from 0.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

STEP = int(os.environ.get("HARM_STEP", 5))


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
            time.sleep(float(os.environ["HARM_SECONDS"]))
            yield step

    module.Plan.eval_steps = eval_steps


HARMS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "loader": ("distft.data.batches", sleeping_loader),
    "collective": ("distft.loop", missing_collective),
    "evaluation": ("distft.data.batches", slow_evaluation),
}


class Finder(importlib.abc.MetaPathFinder):
    """Changes one module as soon as it has been imported."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("RANK") == os.environ.get("HARM_RANK") and "HARM" in os.environ:
    sys.meta_path.insert(0, Finder(*HARMS[os.environ["HARM"]]))
