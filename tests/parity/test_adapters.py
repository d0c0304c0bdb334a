"""LoRA layers are fused under every engine, and ZeRO-3 gathers what they read and frees it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distft.config.schema import Run
from distft.objective.trainee import LossRequest, LossSums
from distft.world import World
from tests.parity import engine
from tests.parity.engine import Case, documents, packed, prepared
from tests.parity.reference import Recipe
from tests.pool import Pool

RECIPE = Recipe(tuning="lora")
WITH_SIBLINGS = 2 * 4  # in each block q with k and v, o, gate with up, down
ALONE = 2 * 7 - 3  # every layer for itself, and not q, k, v of the first block, through which nothing passes back


class Watched(TorchDispatchMode):
    """Counts calls of the fused operator, and the frozen layers of blocks that are whole at a time."""

    def __init__(self, strategy: Any) -> None:
        super().__init__()
        self.strategy = strategy
        self.calls = self.most_whole = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.calls += function is torch.ops.distft.adapted_linear.default
        self.most_whole = max(self.most_whole, len([name for name in whole(self.strategy) if "base_layer" in name]))
        return function(*arguments, **(options or {}))


def passes(world: World, case: Case) -> tuple[list[int], int, set[str]]:
    """Of three passes forward and backward: fused calls, most layers whole at a time, and those whole behind a pass."""
    with freeing_at_once():
        strategy: Any = prepared(world, case)
    calls, most, left = [], 0, set()
    for group in documents():
        batch = packed(group)
        with Watched(strategy) as watched:
            answer = strategy.forward(LossRequest(batch, 1.0, 0.0, 2))
            assert isinstance(answer, LossSums)
            left |= whole(strategy)
            strategy.backward(answer.loss, last=True)
        strategy.step(0.1)
        left |= whole(strategy)
        calls.append(watched.calls)
        most = max(most, watched.most_whole)
    return calls, most, left


@contextlib.contextmanager
def freeing_at_once() -> Iterator[None]:
    """ZeRO-3 without prefetching, and keeping nothing that it will need again soon: a tiny model is all soon."""
    original = engine.run_of

    def run_of(case: Case) -> Run:
        run = original(case)
        if case.strategy == "zero3":
            run.strategy.deepspeed["zero_optimization"] |= {"stage3_max_reuse_distance": 0,
                                                            "stage3_prefetch_bucket_size": 0}  # fmt: skip
        return run

    engine.run_of = run_of
    try:
        yield
    finally:
        engine.run_of = original


def whole(strategy: Any) -> set[str]:
    """Parameters inside blocks that this rank holds whole under ZeRO-3."""
    status = {name: getattr(parameter, "ds_status", None) for name, parameter in strategy.parameters.items()}
    return {name for name, each in status.items() if "layers" in name and each is not None and each.name == "AVAILABLE"}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("strategy", "calls"),
    [("ddp", WITH_SIBLINGS), ("zero2", WITH_SIBLINGS), ("fsdp", WITH_SIBLINGS), ("zero3", ALONE)],
)
def test_layers_are_fused(pool: Callable[[int], Pool], strategy: str, calls: int, checkpointing: str) -> None:
    case = Case(strategy, 1, RECIPE, layout="packed", checkpointing=checkpointing)
    times = 2 if checkpointing == "full" else 1
    for counts, most, left in pool(2).run(passes, case):
        assert counts == [times * calls] * 3
        assert left == set()
        if strategy == "zero3":
            assert most == (7 if checkpointing == "full" else 1)  # DeepSpeed keeps what it gathers to run a block again
