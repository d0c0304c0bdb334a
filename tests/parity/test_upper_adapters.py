"""Adapters on upper layers only: nothing goes back below them, and nothing below them is run twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distft.model.load import blocks
from distft.objective.trainee import LossRequest
from distft.world import World
from tests.parity.engine import Case, micro_batches, prepared
from tests.parity.reference import Recipe, documents
from tests.pool import Pool


def seen(world: World, case: Case) -> tuple[list[int], list[bool]]:
    """Blocks in the order in which they are run, and whether the embeddings' and the blocks' outputs need gradients."""
    strategy = prepared(world, case)
    model: Any = strategy.trainee.model
    entered: list[int] = []
    needed: list[bool] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, out: needed.append(out.requires_grad))
    for index, block in enumerate(blocks(model)):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        block.register_forward_hook(lambda _, __, out: needed.append(out.requires_grad))
    batch = micro_batches(documents()[0], world, case)[0]
    answer: Any = strategy.forward(LossRequest(batch, 1 / 50))
    needed = needed[:]  # a second forward of a block appends no more
    strategy.backward(answer.loss, last=True)
    return entered, needed


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_frozen_blocks_below_the_first_adapter_run_once(pool: Callable[[int], Pool], strategy: str) -> None:
    case = Case(strategy, 1, Recipe(tuning="lora"), checkpointing="full", target=r".*layers\.1\..*_proj")
    for entered, needed in pool(2).run(seen, case):
        assert entered == [0, 1, 1]
        assert needed == [False, False, True]


def test_a_low_adapter_takes_them_all_back(pool: Callable[[int], Pool]) -> None:
    """Negative control."""
    case = Case("ddp", 1, Recipe(tuning="lora"), checkpointing="full")
    for entered, needed in pool(2).run(seen, case):
        assert sorted(entered) == [0, 0, 1, 1]
        assert needed == [False, True, True]
