"""The ranges that checkpoints are made of: they cover everything once, and writing into them changes the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distft.objective.trainee import LossRequest, LossSums
from distft.world import World
from tests.parity.engine import NUM_SOURCES, Case, prepared, reference_name, rows, take, train
from tests.parity.reference import TARGETS, Recipe, base_weights, documents
from tests.pool import Pool

LAYOUTS = [
    (strategy, num_ranks)
    for strategy in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
    for num_ranks in (1, 2)
] + [("hsdp", 4)]


def pattern(name: str, kind: str, start: int, length: int) -> Tensor:
    """Values that tell where they belong, none twice in a tensor; of the size of weights."""
    offset = sum(map(ord, name + kind)) % 89
    return ((torch.arange(start, start + length) + offset) % 1009 - 504) / 8192


def loss_of(strategy: Any) -> float:
    with torch.no_grad():
        answer = strategy.forward(LossRequest(rows(documents()[0][:3]), 1.0, 1.0, NUM_SOURCES))
    assert isinstance(answer, LossSums)
    return float(answer.nll.sum())


def overwrite(world: World, case: Case, refreshed: bool) -> dict[str, Any]:
    """Train a step, evaluate, then write the pattern into every range, and look at what the model became."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    loss_of(strategy)  # a forward pass without a backward one: nothing it leaves behind may be used later
    full = take(strategy)
    frozen = {name: tensor for name, tensor in strategy.gather(frozen_names(strategy)) if tensor is not None}
    ranges = [(s.name, s.kind, s.shape, s.start, s.tensor.detach().clone()) for s in strategy.shards()]
    for shard in strategy.shards():
        shard.tensor.copy_(pattern(shard.name, shard.kind, shard.start, shard.tensor.numel()))
    if refreshed:
        strategy.refresh()
    written = take(strategy)
    loss = loss_of(strategy)
    strategy.num_updates = 41
    _, norm = train(strategy, world, case, 1)
    return {
        "writes": strategy.writes_shards,
        "ranges": ranges,
        "full": full,
        "frozen": frozen,
        "written": written,
        "loss": loss,
        "norm": norm,
        "updates": strategy.num_updates,
    }


def frozen_names(strategy: Any) -> list[str]:
    return [name for name, parameter in strategy.trainee.model.named_parameters() if not parameter.requires_grad]


def plain_loss(world: World, case: Case) -> tuple[float, float]:
    """The same with one rank under DDP, which is plain torch, all parameters overwritten by name."""
    strategy = prepared(world, case)
    for shard in strategy.shards():
        shard.tensor.copy_(pattern(shard.name, shard.kind, shard.start, shard.tensor.numel()))
    strategy.num_updates = 41
    loss = loss_of(strategy)
    return loss, train(strategy, world, case, 1)[1]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("strategy", "num_ranks"), LAYOUTS)
def test_ranges_cover_everything_once_and_can_be_overwritten(
    pool: Callable[[int], Pool], strategy: str, num_ranks: int, tuning: str
) -> None:
    recipe = Recipe(tuning=tuning, optimizer="adamw", lr=0.01, tied=True)
    found = pool(num_ranks).run(overwrite, Case(strategy, 1, recipe), True)
    loss, norm = pool(1).run(plain_loss, Case("ddp", 1, recipe))[0]
    assert_covers_once(found)
    for rank in found:
        assert rank["loss"] == pytest.approx(loss, rel=1e-5)
        assert rank["norm"] == pytest.approx(norm, rel=1e-5)
        assert rank["updates"] == 42
    for name, tensor in found[0]["written"].items():
        original = next(r[0] for r in found[0]["ranges"] + found[-1]["ranges"] if reference_name(r[0]) == name)
        assert torch.equal(tensor.view(-1), pattern(original, "param", 0, tensor.numel())), name
    base = base_weights(recipe.tied)
    assert set(found[0]["frozen"]) == ({peft_name(name) for name in base} if tuning == "lora" else set())
    for name, weight in base.items() if tuning == "lora" else ():
        assert torch.equal(found[0]["frozen"][peft_name(name)], weight), name
    assert all(not rank["written"] and not rank["frozen"] for rank in found[1:])  # gathered on rank 0 alone


def peft_name(name: str) -> str:
    """Where PEFT has a frozen weight: adapted layers keep theirs one level deeper."""
    module, _, key = name.rpartition(".")
    adapted = module.split(".")[-1] in TARGETS
    return f"base_model.model.{module}{'.base_layer' if adapted else ''}.{key}"


def assert_covers_once(found: list[dict[str, Any]]) -> None:
    """Together the writing ranks hold each value of each kind exactly once, and weights equal the gathered ones."""
    full = found[0]["full"]
    covered: dict[tuple[str, str], Tensor] = {}
    for rank in found:
        for name, kind, shape, start, tensor in rank["ranges"]:
            assert tensor.dtype == torch.float32
            assert tensor.numel() > 0
            whole = full[reference_name(name)]
            assert tuple(whole.shape) == tuple(shape)
            count = covered.setdefault((reference_name(name), kind), torch.zeros(whole.numel()))
            if rank["writes"]:
                count[start : start + tensor.numel()] += 1
            if kind == "param":
                assert torch.equal(tensor, whole.view(-1)[start : start + tensor.numel()]), name
    assert set(covered) == {(name, kind) for name in full for kind in ("param", "exp_avg", "exp_avg_sq")}
    for key, count in covered.items():
        assert bool((count == 1).all()), key


def test_without_refresh_replicas_differ(pool: Callable[[int], Pool]) -> None:
    """Negative control: DDP's ranks each know their own part only until they have exchanged them."""
    case = Case("ddp", 1, Recipe(optimizer="adamw", lr=0.01, tied=True))
    loss, _ = pool(1).run(plain_loss, case)[0]
    assert all(abs(rank["loss"] / loss - 1) > 1e-4 for rank in pool(2).run(overwrite, case, False))
