"""A gradient that is not finite on one rank changes nothing on any rank, bit for bit, whatever the strategy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distft.strategy.base import Strategy
from distft.world import World
from tests.parity.engine import Case, prepared, train
from tests.parity.reference import Recipe
from tests.pool import Pool

LAYOUTS = [(strategy, 2) for strategy in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")] + [("hsdp", 4)]
State = dict[tuple[str, str], Tensor]


def state_of(strategy: Strategy) -> State:
    """This rank's ranges of weights and moments, copied."""
    return {(shard.kind, shard.name): shard.tensor.detach().clone() for shard in strategy.shards()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def poisoned_steps(world: World, case: Case) -> dict[str, bool | float]:
    """A good step, a poisoned one, one that is not kept, a good step; the same again with the good ones alone."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    before, updates_before = state_of(strategy), strategy.num_updates
    _, norm = train(strategy, world, replace(case, poisoned=(1, world.size - 1)), 1)
    after_poison, updates_after = state_of(strategy), strategy.num_updates
    _, dropped_norm = train(strategy, world, replace(case, kept=False), 1)
    after_dropped = state_of(strategy)
    last = train(strategy, world, case, 2)
    end = state_of(strategy)

    plain = prepared(world, case)
    train(plain, world, case, 0)
    plain_last = train(plain, world, case, 2)
    return {
        "norm": norm,
        "dropped norm": dropped_norm,
        "poison changed nothing": same(before, after_poison),
        "dropping changed nothing": same(before, after_dropped),
        "updates counted": updates_before == updates_after == 1 and strategy.num_updates == 2,
        "goes on as if the steps had not been": last == plain_last and same(end, state_of(plain)),
        "good steps change the state": not same(before, end),
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("strategy", "num_ranks"), LAYOUTS)
def test_a_poisoned_step_leaves_every_bit(
    pool: Callable[[int], Pool], strategy: str, num_ranks: int, optimizer: str
) -> None:
    case = Case(strategy, 2, Recipe(optimizer=optimizer, lr=0.01, clip=1.0))
    for found in pool(num_ranks).run(poisoned_steps, case):
        assert not math.isfinite(found.pop("norm"))
        assert math.isfinite(found.pop("dropped norm"))
        assert all(found.values()), found
