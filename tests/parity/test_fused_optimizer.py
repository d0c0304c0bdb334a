"""Every engine's AdamW runs as torch's one fused kernel, whatever the engine puts around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distft.world import World
from tests.parity import engine
from tests.parity.engine import Case, prepared, train
from tests.parity.reference import Recipe
from tests.pool import Pool

ADAMW = Recipe(optimizer="adamw", lr=0.01, clip=1.0)
LAYOUTS = [(name, 2) for name in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")] + [("hsdp", 4)]
FUSED = "aten::_fused_adamw_"
UNFUSED = {"aten::addcdiv_", "aten::_foreach_addcdiv_", "aten::lerp_", "aten::_foreach_lerp_"}  # of AdamW in steps


def operators(world: World, case: Case, fused: bool = True) -> set[str]:
    """Names of the operators that a training step of this rank runs."""
    plain = engine.make_optimizer
    if not fused:

        def in_steps(named: Iterable[tuple[str, nn.Parameter]], shapes: Any, optim: Any) -> torch.optim.Optimizer:
            optimizer = plain(named, shapes, optim)
            for group in optimizer.param_groups:
                group["fused"] = False
            return optimizer

        engine.make_optimizer = in_steps
    try:
        strategy = prepared(world, case)
    finally:
        engine.make_optimizer = plain
    train(strategy, world, case, 0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        train(strategy, world, case, 1)
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(("strategy", "num_ranks"), LAYOUTS)
def test_adamw_is_fused(pool: Callable[[int], Pool], strategy: str, num_ranks: int) -> None:
    for names in pool(num_ranks).run(operators, Case(strategy, 1, ADAMW)):
        assert FUSED in names
        assert not names & UNFUSED


def test_an_adamw_that_is_not_fused_is_noticed(pool: Callable[[int], Pool]) -> None:
    for names in pool(2).run(operators, Case("zero2", 1, ADAMW), False):
        assert FUSED not in names
        assert names & UNFUSED
