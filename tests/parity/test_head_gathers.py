"""Under engines that shard parameters the head is gathered once a pass, however many chunks its loss is made in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from distft.objective.trainee import LossRequest
from distft.world import World
from tests.parity.engine import NUM_SOURCES, Case, packed, prepared
from tests.parity.reference import documents
from tests.pool import Pool


class Gathers(TorchDispatchMode):
    """Counts collectives that gather."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function._schema.name
        self.count += name.startswith("c10d::") and "allgather" in name
        return function(*arguments, **(options or {}))


def gathers(world: World, strategy_name: str) -> dict[int, tuple[int, int]]:
    """Gathers in the forward and the backward pass of a later step, with one chunk and with many."""
    strategy = prepared(world, Case(strategy_name, layout="packed"))
    trainee: Any = strategy.trainee
    batch = packed(documents()[0])
    calls = []
    trainee.model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    found = {}
    for chunk in (10_000, 2):
        trainee.vocab_chunk = chunk
        for _ in range(2):
            calls.clear()
            with Gathers() as forward:
                answer: Any = strategy.forward(LossRequest(batch, 1 / batch.num_supervised, num_sources=NUM_SOURCES))
            with Gathers() as backward:
                strategy.backward(answer.loss, last=True)
            strategy.step(0.01)
        assert len(calls) == 1
        found[chunk] = (forward.count, backward.count)
    return found


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_the_head_is_gathered_once_a_pass(strategy: str, pool: Callable[[int], Pool]) -> None:
    for found in pool(2).run(gathers, strategy):
        assert found[2] == found[10_000]
        assert found[2][0] > 0
