"""Parameters that do not fit the usual mould: no dimension, fewer rows than ranks, unused by some ranks, frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distft.model.load import blocks
from distft.objective.trainee import Trainee
from distft.optim import make_optimizer
from distft.strategy import make_strategy
from distft.strategy.base import Strategy
from distft.weights.store import MemoryWeights
from distft.world import World
from tests.parity.engine import Case, run_of, take, train
from tests.parity.reference import Recipe, base_weights, config, documents
from tests.pool import Pool


class Odd(nn.Module):
    """In place of an MLP: a gain without dimensions, a single row, an expert each for short and long rows."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(()))
        self.row = nn.Parameter(torch.empty(1, hidden_size))
        self.frozen = nn.Parameter(torch.empty(3, hidden_size), requires_grad=False)
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:  # [rows, length, hidden]
        expert = self.experts[int(hidden.shape[1] > 16)]
        return self.gain * expert(hidden) + self.row + self.frozen.sum(0)


def prepared_odd(world: World, case: Case, find_unused: bool) -> Strategy:
    from transformers import AutoModelForCausalLM

    run = run_of(case)
    strategy = make_strategy(run, world, "fp32")
    with strategy.born():
        model: Any = AutoModelForCausalLM.from_config(config(tied=True))
        model.model.layers[0].mlp = Odd(model.config.hidden_size)
        if not find_unused:  # the engines know by the name that parameters may go unused
            mlp = model.model.layers[0].mlp
            mlp.branches = mlp.experts
            del mlp.experts
            mlp.forward = lambda hidden: mlp.gain * mlp.branches[int(hidden.shape[1] > 16)](hidden) + mlp.row
    generator = torch.Generator().manual_seed(3)
    tensors = dict(base_weights(True))
    for name, parameter in model.named_parameters():
        if name not in tensors:
            tensors[name] = torch.randn(parameter.shape, generator=generator) / 3
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    optimizer = partial(make_optimizer, shapes=shapes, optim=run.optim)
    strategy.prepare(Trainee(model), blocks(model), MemoryWeights(tensors), optimizer)
    return strategy


def train_odd(world: World, case: Case, find_unused: bool = True) -> dict[str, Any]:
    strategy = prepared_odd(world, case, find_unused)
    steps = [train(strategy, world, case, index) for index in range(len(documents()))]
    ranges = [(shard.name, shard.start, shard.tensor.numel()) for shard in strategy.shards() if shard.kind == "param"]
    for shard in strategy.shards():
        shard.tensor.mul_(2)
    strategy.refresh()
    return {"steps": steps, "doubled": take(strategy), "ranges": ranges, "writes": strategy.writes_shards}


@pytest.mark.parametrize(("strategy", "num_ranks"), [("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("hsdp", 4)])
@pytest.mark.parametrize("short_of_bins", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_odd_parameters_train_as_on_one_rank(
    pool: Callable[[int], Pool], strategy: str, num_ranks: int, short_of_bins: bool, optimizer: str
) -> None:
    recipe = Recipe(optimizer=optimizer, lr=0.02, tied=True, clip=1.0)
    # one document a micro-batch, so that which expert a document takes does not depend on its neighbours
    plain = pool(1).run(train_odd, Case("ddp", 7, recipe))[0]
    num_micro_batches = 7 if short_of_bins else -(-7 // num_ranks)
    ranks = pool(num_ranks).run(train_odd, Case(strategy, num_micro_batches, recipe))
    found = ranks[0]
    for steps in (rank["steps"] for rank in ranks):
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(plain["steps"]), rtol=1e-5, atol=0)
    scalar = "model.layers.0.mlp.gain"
    assert found["doubled"][scalar].shape == ()
    for name, tensor in plain["doubled"].items():
        torch.testing.assert_close(found["doubled"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    owners = [rank for rank in ranks if rank["writes"] and (scalar, 0, 1) in rank["ranges"]]
    assert len(owners) == 1
    assert "model.layers.0.mlp.frozen" not in plain["doubled"]


def test_an_unused_parameter_is_what_the_name_of_experts_is_for(pool: Callable[[int], Pool]) -> None:
    """Negative control: where nothing announces unused parameters, DDP refuses to go on rather than be wrong."""
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        pool(2).run(train_odd, Case("ddp", 4, Recipe(tied=True)), False)
