"""What the host does in a step: it waits for no number of the device and leaves no cycles behind."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distft.data.batch import Step
from distft.loop import COLLECT_EVERY, Fit, collect_at, scheduled_collection
from distft.strategy.base import Strategy
from distft.world import World
from tests.parity.engine import NUM_SOURCES, Case, micro_batches, prepared, run_of
from tests.parity.reference import Recipe, documents
from tests.pool import Pool

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2", "item")
RECIPE = Recipe(optimizer="adamw", lr=0.01, clip=1.0)


def caller() -> str:
    """The innermost place that is neither torch's nor this file's."""
    outside = (os.path.dirname(torch.__file__), __file__)
    frames = traceback.extract_stack()
    return next(f"{one.filename}:{one.lineno}" for one in reversed(frames) if not one.filename.startswith(outside))


class Waits(TorchDispatchMode):
    """Counts operators whose result, or its shape, the host can only have once the device is done.

    `Tensor.tolist` and `numpy` on the CPU pass it by: on a GPU they need a copy to the host, which is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.on_boundaries = 0  # operators that read `watched`
        self.watched: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chosen = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in WAITING or chosen:
            self.seen.append(f"{name} in {caller()}")
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        self.on_boundaries += any(one.untyped_storage().data_ptr() in self.watched for one in tensors)
        return func(*args, **(kwargs or {}))


class Careless:
    """A strategy that looks at the loss of every micro-batch: the negative control."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.strategy, name)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        assert loss.item() == loss.item()
        self.strategy.backward(loss, last)


def fit_of(strategy: Strategy, world: World, case: Case) -> Fit:
    run = run_of(case)
    missing: Any = None
    return Fit(
        config=run, world=world, strategy=strategy, plan=missing, evaluation_steps=None, steps=missing, num_steps=100,
        source_names=["a", "b"], eval_source_names=[], log=missing, state=missing, checkpoints=missing,
        stop_requested=list, flops=lambda step: 0.0, peak_flops=None,
    )  # fmt: skip


def step_of(index: int, world: World, case: Case) -> Step:
    group = documents()[index % len(documents())]
    num_tokens = sum(len(document.tokens) for document in group)
    supervised = sum(document.num_supervised for document in group)
    by_source = (0,) * NUM_SOURCES
    return Step(index, tuple(micro_batches(group, world, case)), supervised, num_tokens, by_source, by_source, 0)


def waits_of(world: World, case: Case, careless: bool = False) -> tuple[list[str], int, int]:
    """What the host waited for in the third step, reads of the documents' boundaries, and tensors left in cycles."""
    from distft.checkpoint.state import TrainState

    strategy: Any = prepared(world, case)
    fit = fit_of(Careless(strategy) if careless else strategy, world, case)
    fit.state = TrainState()
    for index in range(2):
        fit.step(step_of(index, world, case))
    step = step_of(2, world, case)
    waits = Waits()
    waits.watched = {
        batch.cu_seqlens.untyped_storage().data_ptr() for batch in step.micro_batches if batch.cu_seqlens is not None
    }
    gc.collect()
    gc.disable()
    try:
        with waits:
            fit.step(step)
        fit.step(step_of(3, world, case))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        tensors = sum(1 for one in gc.garbage if isinstance(one, torch.Tensor) and one.numel() > 1)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return waits.seen, waits.on_boundaries, tensors


# DeepSpeed looks at the norm of each parameter group and at the whole one's before it updates.
EXPECTED = {
    ("zero1", "full"): 3,
    ("zero1", "lora"): 2,
    ("zero2", "full"): 3,
    ("zero2", "lora"): 2,
    ("zero3", "full"): 1,
    ("zero3", "lora"): 1,
}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_a_step_waits_for_nothing(pool: Callable[[int], Pool], strategy: str, tuning: str) -> None:
    case = Case(strategy, 2, replace(RECIPE, tuning=tuning), layout="packed")
    for seen, on_boundaries, in_cycles in pool(2).run(waits_of, case):
        assert len(seen) == EXPECTED.get((strategy, tuning), 0), seen
        assert on_boundaries == 0
        assert in_cycles == 0


def test_a_step_that_looks_at_its_loss_is_seen(pool: Callable[[int], Pool]) -> None:
    case = Case("ddp", 2, RECIPE, layout="packed")
    seen, _, _ = pool(1).run(waits_of, case, True)[0]
    assert len(seen) == 4  # two looks at each of two micro-batches


def test_garbage_is_collected_at_set_steps_alone() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.self = self

    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collections.append(phase)

    assert gc.isenabled()
    with scheduled_collection():
        gc.callbacks.append(note)
        try:
            for step in range(1, 2 * COLLECT_EVERY + 1):
                made = [Cycle() for _ in range(2000)]
                del made
                collect_at(step)
                assert len(collections) == step // COLLECT_EVERY
        finally:
            gc.callbacks.remove(note)
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
