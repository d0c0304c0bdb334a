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
NUM_BLOCKS = 2
ALONE, WITH_SIBLINGS = 7, 4  # q, k, v, o, gate, up, down; q with k and v, o, gate with up, down


class Calls(TorchDispatchMode):
    """Counts calls of the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.distft.adapted_linear.default
        return function(*arguments, **(options or {}))


def passes(world: World, case: Case) -> tuple[list[int], list[str]]:
    """Fused calls of three passes forward and backward, and the layers that are still whole behind any of them."""
    with freeing_at_once():
        strategy: Any = prepared(world, case)
    counts, whole = [], set()
    for group in documents():
        batch = packed(group)
        with Calls() as calls:
            answer = strategy.forward(LossRequest(batch, 1.0, 0.0, 2))
            assert isinstance(answer, LossSums)
            whole |= gathered(strategy)
            strategy.backward(answer.loss, last=True)
        strategy.step(0.1)
        whole |= gathered(strategy)
        counts.append(calls.count)
    return counts, sorted(whole)


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


def gathered(strategy: Any) -> set[str]:
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
    for counts, whole in pool(2).run(passes, case):
        assert counts == [times * NUM_BLOCKS * calls] * 3
        assert whole == []
