"""What the engines promise besides their numbers: equal copies, few collectives, few bytes read, clear refusals."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distft.errors import UserMistake
from distft.strategy import make_strategy
from distft.weights.store import MemoryWeights
from distft.world import World
from tests.parity.engine import Case, prepared, run_case, run_of, train
from tests.parity.reference import Outcome, Recipe, base_weights, reference
from tests.parity.test_parity import BOUND, differences
from tests.pool import Pool

RECIPE = Recipe(optimizer="adamw", lr=0.01, clip=1.0)


# --- copies ---------------------------------------------------------------------------------------------------------


def local_values(world: World, case: Case) -> dict[str, Tensor]:
    """What this rank holds of every parameter after two steps."""
    strategy = prepared(world, case)
    for index in range(2):
        train(strategy, world, case, index)
    held = {}
    for name, parameter in strategy.trainee.named_parameters():
        value = parameter.detach()
        held[name] = (value.to_local() if hasattr(value, "to_local") else value).clone()
    return held


@pytest.mark.parametrize(("strategy", "num_ranks", "twin"), [("ddp", 2, 1), ("hsdp", 4, 2)])
def test_copies_stay_equal_bit_for_bit(pool: Callable[[int], Pool], strategy: str, num_ranks: int, twin: int) -> None:
    held = pool(num_ranks).run(local_values, Case(strategy, 2, RECIPE))
    assert all(torch.equal(held[0][name], held[twin][name]) for name in held[0])
    if strategy == "hsdp":
        assert any(not torch.equal(held[0][name], held[1][name]) for name in held[0])  # two ranks share one copy


# --- collectives ----------------------------------------------------------------------------------------------------

REDUCTIONS = ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single")


@contextmanager
def counted(names: tuple[str, ...]) -> Iterator[Counter[str]]:
    """Counts calls of collectives that move more than one value."""
    calls: Counter[str] = Counter()
    originals: dict[str, Any] = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs.get("output_tensor", kwargs.get("output", args[0] if args else None))
            calls[name] += int(tensor is not None and tensor.numel() > 1)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def reductions(world: World, case: Case) -> int:
    """Calls that reduce gradients in one step, the buckets' first layout and other first-time matters behind it."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    with counted(REDUCTIONS) as calls:
        train(strategy, world, case, 2)
    return sum(calls.values()) - 1  # one is the test's own: the loss over all ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_reduced_once_a_step_however_many_micro_batches(
    pool: Callable[[int], Pool], strategy: str
) -> None:
    once = pool(2).run(reductions, Case(strategy, 1, RECIPE))
    four = pool(2).run(reductions, Case(strategy, 4, RECIPE))
    assert once == four
    assert once[0] == {"ddp": 1, "fsdp": 5}[strategy]  # one bucket; embedding, two blocks, head and the rest


def many_buckets(world: World, case: Case) -> tuple[int, Outcome]:
    """A case under DDP with buckets of 2 KB, which it lays out anew behind the first step."""
    from distft.strategy import ddp

    original: Any = ddp.DistributedDataParallel
    ddp.DistributedDataParallel = partial(original, bucket_cap_mb=0.002)  # type: ignore[assignment,misc]
    try:
        return reductions(world, case), run_case(world, case)
    finally:
        ddp.DistributedDataParallel = original  # type: ignore[misc]


@pytest.mark.parametrize("recipe", [Recipe(tied=True), Recipe(tuning="lora", optimizer="adamw", lr=0.01)])
def test_many_buckets_give_the_same_sums(pool: Callable[[int], Pool], recipe: Recipe) -> None:
    num_reductions, outcome = pool(2).run(many_buckets, Case("ddp", 4, recipe))[0]
    assert num_reductions > 1
    found = differences(outcome, reference(recipe), recipe)
    assert max(found.values()) < BOUND, found


# --- weights --------------------------------------------------------------------------------------------------------


class Recorded(MemoryWeights):
    """Counts the values read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.num_read: Counter[str] = Counter()

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        values = super().read(name, start, length)
        self.num_read[name] += values.numel()
        return values


def values_read(world: World, case: Case) -> Counter[str]:
    weights = Recorded(base_weights(case.recipe.tied))
    prepared(world, case, weights)
    return weights.num_read


@pytest.mark.parametrize(("strategy", "num_ranks", "copies"), [("ddp", 2, 2), ("fsdp", 2, 1), ("hsdp", 4, 2)])
def test_a_rank_reads_no_more_than_it_holds(
    pool: Callable[[int], Pool], strategy: str, num_ranks: int, copies: int
) -> None:
    read: Counter[str] = sum(pool(num_ranks).run(values_read, Case(strategy)), Counter())
    assert read == {name: copies * weight.numel() for name, weight in base_weights(False).items()}


# --- refusals and imports -------------------------------------------------------------------------------------------


def mesh_shape(world: World, shard_size: int | str) -> tuple[int, ...]:
    run = run_of(Case("hsdp"))
    run.strategy.shard_size = shard_size
    strategy: Any = make_strategy(run, world, "fp32")
    return tuple(strategy.mesh.shape)


def test_shard_size_divides_the_ranks_or_is_refused(pool: Callable[[int], Pool]) -> None:
    assert pool(4).run(mesh_shape, 2) == [(2, 2)] * 4
    assert pool(4).run(mesh_shape, "auto") == [(1, 4)] * 4  # all ranks of the pool are on one node
    with pytest.raises(UserMistake, match=r"strategy\.shard_size=3 does not divide the 4 ranks.*one of 1, 2, 4"):
        pool(4).run(mesh_shape, 3)


IMPORTS = """
import sys
from distft.config.schema import Run
from distft.strategy import make_strategy
from distft.world import join, leave
run = Run()
world = join()
for name in ("ddp", "fsdp", "zero2"):
    run.strategy.name = name
    make_strategy(run, world, "fp32")
    print(name, *(module for module in ("deepspeed", "peft", "datasets") if module in sys.modules))
leave()
"""


def test_only_the_chosen_engine_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ddp"] in lines
    assert ["fsdp"] in lines
    assert any(line[0] == "zero2" and "deepspeed" in line for line in lines)  # the check itself can see it
