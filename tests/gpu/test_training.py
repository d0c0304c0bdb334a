"""A run's inner life on a device: the loss falls in bf16, no step waits for the host, checkpoints come back exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distft.checkpoint.state import TrainState, load, save
from distft.data.batches import pin
from distft.guard import Late
from distft.loop import Fit
from distft.world import World
from tests.gpu.places import EVERYWHERE, GPU, world_of_one
from tests.parity.engine import Case, prepared
from tests.parity.reference import Recipe
from tests.parity.test_host import Careless, fit_of, step_of

STEPS = 20


class Broken(Careless):
    """A strategy whose losses are not numbers."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.strategy.backward(loss * float("nan"), last)


def case_of(strategy: str, tuning: str = "full", precision: str = "bf16") -> Case:
    recipe = Recipe(tuning=tuning, optimizer="adamw", lr=0.02, clip=1.0)
    return Case(strategy, recipe=recipe, layout="packed", precision=precision)


def fit_for(world: World, case: Case) -> Fit:
    fit = fit_of(prepared(world, case), world, case)
    fit.state = TrainState()
    fit.config.optim.lr, fit.num_steps = case.recipe.lr, 10 * STEPS
    return fit


def train(fit: Fit, world: World, case: Case, steps: range) -> list[torch.Tensor]:
    losses = []
    for index in steps:
        step = step_of(0, world, case)  # the same documents again, so that their loss has to fall
        _, nll = fit.step(pin(step) if world.device.type == "cuda" else step)
        fit.state.step = index + 1
        losses.append(nll.sum() / step.num_supervised)
    return losses


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("strategy", "tuning"), [("ddp", "full"), ("ddp", "lora"), ("fsdp", "full")])
def test_the_loss_falls(strategy: str, tuning: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of_one(device, monkeypatch) as world:
        case = case_of(strategy, tuning)
        losses = [float(loss) for loss in train(fit_for(world, case), world, case, range(STEPS))]
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("device", EVERYWHERE)
def test_a_pass_computes_with_the_adapters_of_the_last_update(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with copies in bf16 from before it: torch's fused optimizers do not say that they wrote."""
    with world_of_one(device, monkeypatch) as world:
        case = case_of("ddp", "lora")
        fit = fit_for(world, case)
        train(fit, world, case, range(2))
        train_again = fit_for(world, case)
        for shard, kept in zip(train_again.strategy.shards(), fit.strategy.shards(), strict=True):
            shard.tensor.copy_(kept.tensor)
        train_again.strategy.refresh()
        train_again.strategy.num_updates = fit.strategy.num_updates
        train_again.state.step = fit.state.step
        (going_on,) = train(fit, world, case, range(2, 3))
        (anew,) = train(train_again, world, case, range(2, 3))
        (first,) = train(fit_for(world, case), world, case, range(1))
    assert torch.equal(going_on, anew)
    assert not torch.equal(going_on, first)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_step_waits_for_the_host(strategy: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of_one(device, monkeypatch) as world:
        case = case_of(strategy)
        fit = fit_for(world, case)
        train(fit, world, case, range(3))
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(fit, world, case, range(3, 5))
            fit.strategy = Careless(fit.strategy)  # type: ignore[assignment]
            with pytest.raises(RuntimeError, match="synchroniz"):
                train(fit, world, case, range(5, 6))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_comes_back(strategy: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of_one(device, monkeypatch) as world:
        case = case_of(strategy)
        fit = fit_for(world, case)
        train(fit, world, case, range(2))
        save(tmp_path, fit.strategy, fit.state, world, keep=1, engine=strategy)
        on = train(fit, world, case, range(2, 4))
        again = fit_for(world, case)
        fresh = train(fit_for(world, case), world, case, range(2, 3))
        again.state = load(tmp_path, again.strategy, world, say=print)
        assert again.state.step == 2
        repeated = train(again, world, case, range(2, 4))
        for one, other in zip(on, repeated, strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(on[0], fresh[0])


@pytest.mark.parametrize("device", EVERYWHERE)
def test_a_step_that_is_not_finite_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of_one(device, monkeypatch) as world:
        case = case_of("ddp", precision="fp32")
        fit = fit_for(world, case)
        train(fit, world, case, range(2))
        before = {shard.name + shard.kind: shard.tensor.clone() for shard in fit.strategy.shards()}
        strategy, fit.strategy = fit.strategy, Broken(fit.strategy)  # type: ignore[assignment]
        norm, _ = fit.step(step_of(0, world, case))
        fit.strategy = strategy
        assert not norm.isfinite()
        for shard in fit.strategy.shards():
            assert torch.equal(shard.tensor, before[shard.name + shard.kind]), shard.name
        train(fit, world, case, range(2, 3))
        assert any(not torch.equal(shard.tensor, before[shard.name + shard.kind]) for shard in fit.strategy.shards())


@pytest.mark.parametrize("device", EVERYWHERE)
def test_a_number_read_late(device: str) -> None:
    value = torch.full((), 3.0, device=device)
    late = Late(value)
    value.add_(1)
    assert late.read() == 3.0


@pytest.mark.parametrize("device", [GPU])
def test_pinned_batches_do_not_wait(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of_one(device, monkeypatch) as world:
        step = pin(step_of(0, world, case_of("ddp")))
        for batch in step.micro_batches:
            assert batch.input_ids.is_pinned()
            moved = batch.to(world.device)
            assert torch.equal(moved.input_ids.cpu(), batch.input_ids)
