"""What is particular to DeepSpeed ZeRO: who holds and reads what, dtypes, logits, experts, and that it stays silent."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distft.errors import UserMistake
from distft.objective.trainee import LogitsRequest, LossRequest, LossSums, Trainee
from distft.optim import make_optimizer
from distft.strategy import make_strategy
from distft.strategy.base import Strategy
from distft.weights.store import MemoryWeights, Weights
from distft.world import World, sum_over
from tests.parity import engine
from tests.parity.engine import NUM_SOURCES, Case, packed, prepared, rows, run_of, train
from tests.parity.reference import Recipe, base_weights, config, documents
from tests.pool import Pool

ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
ADAMW = Recipe(optimizer="adamw", lr=0.01)


@dataclass
class Counting:
    """Weights that count the values read of each."""

    weights: Weights
    read_values: dict[str, int]

    def names(self) -> list[str]:
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        values = self.weights.read(name, start, length)
        self.read_values[name] = self.read_values.get(name, 0) + values.numel()
        return values


def laid_out(world: World, case: Case, model: nn.Module, weights: Weights, strategy: Strategy) -> Strategy:
    run = run_of(case)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    trainee = Trainee(model)
    strategy.prepare(trainee, [], weights, partial(make_optimizer, shapes=shapes, optim=run.optim))
    trainee.train()
    return strategy


def held_and_read(world: World, case: Case) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    strategy = make_strategy(run_of(case), world, case.precision)
    with strategy.born():
        model = AutoModelForCausalLM.from_config(config(False), attn_implementation="eager")
    assert all(parameter.is_meta for parameter in model.parameters())
    counting = Counting(MemoryWeights(base_weights(False)), {})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        laid_out(world, case, model, counting, strategy)
        train(strategy, world, case, 0)
    owned: dict[str, int] = {}
    for shard in strategy.shards():
        if shard.kind == "param":
            owned[shard.name] = owned.get(shard.name, 0) + shard.tensor.numel()
    return {
        "read": counting.read_values,
        "owned": owned,
        "partitioned": sum(parameter.numel() == 0 for parameter in model.parameters()),
        "dtypes": {parameter.dtype for parameter in model.parameters()},
        "printed": printed.getvalue(),
        "linear is plain": nn.functional.linear is torch._C._nn.linear,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ZERO)
def test_each_rank_reads_what_it_owns(pool: Callable[[int], Pool], strategy: str, precision: str) -> None:
    ranks = pool(2).run(held_and_read, Case(strategy, 1, ADAMW, precision=precision))
    for name, weight in base_weights(False).items():
        assert sum(rank["owned"].get(name, 0) for rank in ranks) == weight.numel()
    for rank in ranks:
        assert rank["read"] == rank["owned"]
        assert rank["dtypes"] == {torch.float32 if precision == "fp32" else torch.bfloat16}
        assert rank["printed"] == ""
        assert rank["linear is plain"]


def with_threshold(threshold: int, function: Callable[..., Any], world: World, case: Case) -> Any:
    """`function` under ZeRO-3 that keeps parameters below `threshold` values gathered (DeepSpeed's own: 100,000)."""
    plain = engine.run_of

    def run_of_case(case: Case) -> Any:
        run = plain(case)
        run.strategy.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
        return run

    engine.run_of = run_of_case
    try:
        return function(world, case)
    finally:
        engine.run_of = plain


def small_stay_gathered(world: World, case: Case, threshold: int) -> tuple[int, float]:
    """Number of parameters that are partitioned between passes, and a loss."""
    strategy = with_threshold(threshold, prepared, world, case)
    train(strategy, world, case, 0)
    strategy.refresh()
    partitioned = sum(parameter.numel() == 0 for parameter in strategy.trainee.parameters())
    return partitioned, train(strategy, world, case, 1)[0]


def test_parameters_kept_gathered_change_no_number(pool: Callable[[int], Pool]) -> None:
    """DeepSpeed keeps parameters below a threshold gathered; the others are empty between passes."""
    case = Case("zero3", 2, ADAMW)
    partitioned, loss = pool(2).run(small_stay_gathered, case, 0)[0]
    gathered, same_loss = pool(2).run(small_stay_gathered, case, 10**6)[0]
    assert (partitioned, gathered) == (len(base_weights(False)), 0)
    assert loss == same_loss


def dtypes_of(world: World, case: Case) -> tuple[set[torch.dtype], set[torch.dtype]]:
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    parameters = list(strategy.trainee.parameters())
    return (
        {parameter.dtype for parameter in parameters if parameter.requires_grad},
        {parameter.dtype for parameter in parameters if not parameter.requires_grad},
    )


@pytest.mark.parametrize("strategy", ZERO)
def test_adapters_are_fp32_beside_a_bf16_base(pool: Callable[[int], Pool], strategy: str) -> None:
    case = Case(strategy, 1, Recipe(tuning="lora", optimizer="adamw", lr=0.01), precision="bf16")
    for trained, frozen in pool(2).run(dtypes_of, case):
        assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def logits_of(world: World, case: Case) -> Tensor:
    """Logits before and after a step, as decoding asks for them between two steps."""
    strategy = prepared(world, case)
    batch = rows(documents()[0][:3])
    request = LogitsRequest(batch.input_ids, batch.position_ids, batch.attention_mask, batch.positions)
    answers = []
    for index in range(2):
        with torch.no_grad():
            answer = strategy.forward(request)
        assert isinstance(answer, Tensor)
        answers.append(answer.float())
        train(strategy, world, case, index)
    return torch.cat(answers)


@pytest.mark.parametrize("strategy", ZERO)
def test_logits_between_steps(pool: Callable[[int], Pool], strategy: str) -> None:
    recipe = Recipe(tied=True)
    expected = pool(1).run(logits_of, Case("ddp", 2, recipe))[0]
    for found in pool(2).run(logits_of, Case(strategy, 2, recipe)):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def uneven_rows(world: World, case: Case) -> list[float]:
    """Losses where the first rank packs several documents in a row and the others have a single one."""
    strategy = prepared(world, case)
    losses = []
    for index in range(3):
        group = documents()[index % 2 * 2]
        mine = group[:4] if world.rank == 0 else group[3 + world.rank : 4 + world.rank]
        answer = strategy.forward(LossRequest(packed(mine), 0.05, 0.0, NUM_SOURCES))
        assert isinstance(answer, LossSums)
        strategy.backward(answer.loss, last=True)
        strategy.step(case.recipe.lr)
        losses.append(float(sum_over(world, answer.nll.clone()).sum()))
    return losses


def uneven_rows_partitioned(world: World, case: Case) -> list[float]:
    return with_threshold(0, uneven_rows, world, case)


def test_ranks_with_unlike_rows_gather_alike(pool: Callable[[int], Pool]) -> None:
    expected = pool(2).run(uneven_rows, Case("ddp", layout="packed"))[0]
    found = pool(2).run(uneven_rows_partitioned, Case("zero3", layout="packed"))[0]
    assert found == pytest.approx(expected, rel=1e-5)


# --- experts ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts that are modules of their own; a token goes to one of them, so that a rank may use a single one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = (hidden.detach().sum(-1) > 0).long()
        answer = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            if mask.any():
                answer[mask] = expert(hidden[mask])
        return answer


def train_experts(world: World, case: Case) -> list[float]:
    """Losses of three steps in which most ranks see a single token, hence a single expert."""
    from transformers import AutoModelForCausalLM

    strategy = make_strategy(run_of(case), world, "fp32")
    with strategy.born():
        model = AutoModelForCausalLM.from_config(config(False), attn_implementation="eager")
        for layer in model.model.layers:
            layer.mlp = Experts(36)
    generator = torch.Generator().manual_seed(3)
    weights = {n: p for n, p in base_weights(False).items() if "mlp" not in n}
    for name, parameter in model.named_parameters():
        if "experts" in name:
            weights[name] = torch.randn(parameter.shape, generator=generator) / 6
    laid_out(world, case, model, MemoryWeights(weights), strategy)
    losses = []
    for index in range(3):
        group = documents()[2][index + world.rank : index + world.rank + 1]
        answer = strategy.forward(LossRequest(rows(group), 0.05, 0.0, NUM_SOURCES))
        assert isinstance(answer, LossSums)
        strategy.backward(answer.loss, last=True)
        strategy.step(case.recipe.lr)
        losses.append(float(sum_over(world, answer.nll.clone()).sum()))
    return losses


def test_separate_experts(pool: Callable[[int], Pool]) -> None:
    expected = pool(2).run(train_experts, Case("ddp"))[0]
    assert pool(2).run(train_experts, Case("zero3"))[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserMistake, match="strategy=zero3"):
        pool(2).run(train_experts, Case("zero2"))
