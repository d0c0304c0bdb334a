"""Numbers that are useless do not reach the weights: a NaN in one gradient of one rank, a batch of garbage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distft import errors
from distft.config.schema import Guard as GuardConfig
from distft.guard import Guard, Losses
from distft.model.load import blocks
from distft.world import World
from tests.faults.runs import ROOT, Shop, records, result
from tests.parity.engine import Case, prepared, train
from tests.parity.reference import Recipe
from tests.parity.test_host import EXPECTED, RECIPE, Waits, fit_of, step_of
from tests.parity.test_skip import same, state_of
from tests.pool import Pool

TRIAL = "NaN in one gradient of one rank; a poisoned batch"
ENGINES = ("fsdp", "zero2", "zero3")


# --- a NaN in one gradient of one rank --------------------------------------------------------------------------------


def poisoned_gradient(world: World, case: Case) -> dict[str, Any]:
    """One value of the gradient that flows into the first block's output becomes NaN on the last rank."""
    from distft.checkpoint.state import TrainState

    strategy = prepared(world, case)
    fit = fit_of(strategy, world, case)
    fit.state = TrainState()
    block = blocks(strategy.trainee.model)[0]
    touched: list[int] = []

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[7] = math.nan
        touched.append(1)
        return gradient

    def hook(module: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(poison)

    def one(index: int) -> float:
        step = step_of(index, world, case)
        norm, _ = fit.step(step)
        fit.guard.note(norm, step)
        assert fit.guard.settle(fit.state, lambda step: []) == ""
        return float(norm)

    one(0)
    before = state_of(strategy)
    handle = block.register_forward_hook(hook) if world.rank == world.size - 1 else None
    norm = one(1)
    after, counted = state_of(strategy), fit.state.skipped
    if handle:
        handle.remove()
    good = one(1)
    return {
        "touched": len(touched),
        "norm": norm,
        "unchanged": same(before, after),
        "counted": counted,
        "in a row": fit.state.skipped_in_a_row,
        "control": math.isfinite(good) and not same(before, state_of(strategy)),
        "updates": strategy.num_updates,
    }


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ENGINES)
def test_a_nan_on_one_rank_changes_nothing_on_any(pool: Callable[[int], Pool], strategy: str, tuning: str) -> None:
    case = Case(strategy, 2, replace(RECIPE, tuning=tuning), layout="packed")
    answers = pool(2).run(poisoned_gradient, case)
    assert [found["touched"] > 0 for found in answers] == [False, True]
    for found in answers:
        assert not math.isfinite(found["norm"])
        assert found["unchanged"], "a rank changed its weights or moments"
        assert found["control"], "the same step without the NaN must change them"
        assert (found["counted"], found["in a row"], found["updates"]) == (1, 0, 2)


# --- dropped by a flag on the device ----------------------------------------------------------------------------------


def dropped_by_a_flag(world: World, case: Case) -> dict[str, bool]:
    """A good step, one that a flag on the device drops, a good one; the same again with the good ones alone."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    before = state_of(strategy)
    flag: Any = torch.tensor(False, device=world.device)
    _, norm = train(strategy, world, replace(case, kept=flag), 1)
    dropped, updates = state_of(strategy), strategy.num_updates
    kept: Any = torch.tensor(True, device=world.device)
    last = train(strategy, world, replace(case, kept=kept), 2)

    plain = prepared(world, case)
    train(plain, world, case, 0)
    plain_last = train(plain, world, case, 2)
    return {
        "norm is told": math.isfinite(norm) and norm > 0,
        "nothing changed": same(before, dropped),
        "not counted": updates == 1 and strategy.num_updates == plain.num_updates == 2,
        "goes on as if it had not been": last == plain_last and same(state_of(strategy), state_of(plain)),
        "good steps change the state": not same(before, state_of(strategy)),
    }


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [(name, "adamw") for name in ("ddp", "zero1", "zero3_offload", *ENGINES)] + [("zero2", "sgd"), ("fsdp", "sgd")],
)
def test_a_step_dropped_on_the_device_leaves_every_bit(
    pool: Callable[[int], Pool], strategy: str, optimizer: str
) -> None:
    case = Case(strategy, 2, Recipe(optimizer=optimizer, lr=0.01, clip=1.0))
    for found in pool(2).run(dropped_by_a_flag, case):
        assert all(found.values()), found


def guarded_waits(world: World, case: Case, spike: str) -> tuple[list[str], list[float]]:
    """What the host waited for in a step under the guard; the losses that each rank remembers."""
    from distft.checkpoint.state import TrainState

    fit = fit_of(prepared(world, case), world, case)
    fit.config.guard = GuardConfig(spike=spike, spike_window=4)
    fit.guard = Guard(fit.config, world)
    fit.state = TrainState()
    for index in range(2):
        fit.step(step_of(index, world, case))
    step = step_of(2, world, case)
    waits = Waits()
    with waits:
        norm, _ = fit.step(step)
        fit.guard.note(norm, step)
    return waits.seen, fit.guard.saved()


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_guard_waits_for_nothing(pool: Callable[[int], Pool], strategy: str) -> None:
    answers = pool(2).run(guarded_waits, Case(strategy, 2, RECIPE, layout="packed"), "skip")
    for seen, losses in answers:
        assert len(seen) == EXPECTED.get((strategy, "full"), 0), seen
        assert len(losses) == 3
    assert answers[0][1] == answers[1][1], "the ranks must compare with the same bits"


# --- what is a spike --------------------------------------------------------------------------------------------------


def judged(losses: Losses, values: list[float]) -> list[bool]:
    return [bool(losses.judge(torch.tensor(value))[2]) for value in values]


CPU = torch.device("cpu")


def test_a_spike_stands_out_of_a_full_window() -> None:
    calm = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.1, 1.9]
    losses = Losses(8, 6.0, False, CPU)
    assert judged(losses, [2.0, 9.0]) == [False, False]  # nothing is judged before the window is full
    losses = Losses(8, 6.0, False, CPU)
    assert not any(judged(losses, calm))
    assert judged(losses, [2.3, 9.0, 2.0, 0.1, 9.0]) == [False, True, False, False, True]
    median, score, _ = losses.judge(torch.tensor(3.0))
    recent = torch.tensor([2.05, 1.95, 2.0, 2.1, 1.9, 2.3, 2.0, 0.1])
    deviation = 1.4826 * (recent - recent.median()).abs().median()
    assert float(median) == pytest.approx(float(recent.median()))
    assert float(score) == pytest.approx(float((3.0 - recent.median()) / deviation), rel=1e-6)


def test_a_flat_curve_is_not_all_spikes() -> None:
    losses = Losses(8, 6.0, False, CPU)
    assert not any(judged(losses, [1.0] * 8 + [1.05, 1.0, 1.04]))
    assert judged(losses, [1.1]) == [True]


def test_what_is_not_finite_is_no_spike_and_not_remembered() -> None:
    losses = Losses(4, 6.0, False, CPU)
    assert judged(losses, [1.0, 1.1, math.nan, 0.9, math.inf, 1.0]) == [False] * 6
    assert losses.saved() == pytest.approx([1.0, 1.1, 0.9, 1.0])
    assert judged(losses, [5.0, math.inf]) == [True, False]


def test_a_level_that_has_risen_for_good_is_taken_where_spikes_are_remembered() -> None:
    risen = [1.0, 1.1, 0.9, 1.0] + [5.0] * 6
    assert judged(Losses(4, 6.0, True, CPU), risen)[4:] == [True] * 3 + [False] * 3
    assert judged(Losses(4, 6.0, False, CPU), risen)[4:] == [True] * 6


def test_what_was_remembered_comes_back_into_a_window_of_any_length() -> None:
    losses = Losses(4, 6.0, False, CPU)
    losses.restore([float(value) for value in range(6)])
    assert losses.saved() == [2.0, 3.0, 4.0, 5.0]
    longer = Losses(8, 6.0, False, CPU)
    longer.restore(losses.saved())
    assert longer.saved() == [2.0, 3.0, 4.0, 5.0]
    assert judged(longer, [99.0]) == [False]


def test_the_guard_takes_at_most_its_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from overheads import BAR, ROWS, median_of  # type: ignore[import-not-found]

    world = World(rank=0, size=1, local_rank=0, data_rank=0, data_size=1, device=CPU)
    medians = {name: median_of(prepared(world), 1000) for name, prepared in ROWS.items() if "guard" in name}
    assert len(medians) >= 3
    assert max(medians.values()) < BAR, medians


# --- a batch of garbage in a real run ---------------------------------------------------------------------------------

NUM_STEPS = 30
POISONED = (18, 20)  # steps at which the rows of garbage come under the seed below, behind the checkpoint of step 14
KNOBS = (
    f"max_steps={NUM_STEPS}", "guard.spike_window=8", "guard.spike_score=4", "checkpoint.every=7", "optim.lr=0.01",
    "schedule=constant", "data.eval_fraction=0", "seed=221",
)  # fmt: skip
GARBAGE = "zq~" + "".join(chr(33 + (n * n * 31 + n * 17) % 90) for n in range(110))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """150 short sums, two of which have noise for an answer that fills most of a bin."""
    shop = Shop.open(tmp_path_factory.mktemp("guards"), 150)
    file = shop.folder / "rows.jsonl"
    lines = file.read_text().splitlines()
    for id in (90, 60):
        lines[id] = json.dumps({"id": id, "question": "?", "answer": GARBAGE})
    file.write_text("\n".join(lines) + "\n")
    return shop


def without(world: World, folder: Path, skipped: tuple[int, ...]) -> tuple[list[float], dict[str, Tensor]]:
    """The run of `folder` by hand, never touching these steps: losses of the others, and its last weights (rank 0)."""
    from distft.checkpoint.state import TrainState
    from distft.config.check import settle
    from distft.config.load import read_snapshot
    from distft.loop import Fit
    from distft.verbs.train import Job
    from distft.world import sum_over

    run = settle(read_snapshot(folder / "config.yaml"))
    run.guard.spike = "none"
    job = Job.assemble(run, folder, world)
    missing: Any = None
    fit = Fit(
        config=run, world=world, strategy=job.strategy, plan=job.plan, evaluation_steps=None, steps=missing,
        num_steps=job.num_steps, source_names=["rows"], eval_source_names=[], log=missing, state=TrainState(),
        checkpoints=missing, stop_requested=list, flops=lambda step: 0.0, peak_flops=None,
    )  # fmt: skip
    losses = []
    for index in range(job.num_steps):
        if index + 1 not in skipped:
            fit.state.step = index
            step = job.plan.step(index)
            _, nll = fit.step(step)
            losses.append(float(sum_over(world, nll)[0].double()) / step.num_supervised)
    return losses, {name: full for name, full in job.strategy.gather() if full is not None}


def same_weights(folder: Path, weights: dict[str, Tensor]) -> bool:
    """Whether what lies in `final/` has the bits of what was trained, by PEFT's name without its adapter's."""
    from safetensors.torch import load_file

    (file,) = (folder / "final").glob("*model.safetensors")
    final = load_file(file)
    trained = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    return bool(final) and all(torch.equal(tensor, trained[name]) for name, tensor in final.items())


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder)]


def the_others(losses: list[float]) -> list[tuple[int, float]]:
    return list(zip([step for step in range(1, NUM_STEPS + 1) if step not in POISONED], losses, strict=True))


def check_listed(folder: Path) -> None:
    """What a run leaves behind that went back to step 14 twice."""
    listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(record["step"], record["back_to"]) for record in listed] == [(18, 14), (20, 14)]
    for record, row in zip(listed, ("rows:90", "rows:60"), strict=True):
        assert row in record["samples"]
        assert record["score"] >= 2.5
        assert record["loss"] > record["median"]
    ended = result(folder)
    assert ended["steps"] == NUM_STEPS
    assert (ended["metrics"]["rollbacks"], ended["metrics"]["skipped"]) == (2, 0)
    state = json.loads((folder / "checkpoints" / f"step-{NUM_STEPS:06d}" / "manifest.json").read_text())["state"]
    assert state["cursor"]["skipped"] == list(POISONED)
    abandoned = [json.loads(line)["step"] for line in (folder / "metrics.abandoned.jsonl").read_text().splitlines()]
    assert {15, 16, 17} <= set(abandoned)


@pytest.mark.trial(TRIAL)
def test_a_run_that_goes_back_equals_one_that_never_had_the_batch(shop: Shop, pool: Callable[[int], Pool]) -> None:
    code, text = shop.run("back", *KNOBS, "guard.spike=rollback", "strategy=fsdp")
    assert code == errors.DONE, text
    for step in POISONED:
        assert f"back to step 14, to go on without the global batch of step {step}" in text
    folder = shop.folder / "back"
    check_listed(folder)
    losses, weights = pool(1).run(without, folder, POISONED)[0]
    assert curve(folder) == the_others(losses)
    assert same_weights(folder, weights)
    losses, weights = pool(1).run(without, folder, POISONED[:1])[0]
    assert len(losses) == NUM_STEPS - 1
    assert not same_weights(folder, weights), "a batch more must show in the bits"


@pytest.mark.trial(TRIAL)
@pytest.mark.thorough
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ENGINES)
def test_warn_skip_and_rollback_on_two_ranks(
    shop: Shop, pool: Callable[[int], Pool], strategy: str, tuning: str
) -> None:
    """A rollback that is stopped by its limit and resumed, a skipped update and the run by hand: the same bits."""
    knobs = (*KNOBS, f"strategy={strategy}", f"tuning={tuning}", "launch.ranks=2")
    if tuning == "lora":
        knobs = (*knobs, "guard.spike_score=2.5")  # what is frozen is random: the loss hardly falls below the noise's
    name = f"{strategy}-{tuning}"
    back = shop.folder / f"{name}-back"
    code, first = shop.run(back.name, *knobs, "guard.spike=rollback", "guard.max_rollbacks=1")
    assert code == errors.STOPPED_BY_GUARD, first
    assert "the run has gone back to step 14 once already" in first
    assert result(back)["status"] == "stopped_by_guard"
    code, second = shop.run(back.name, *knobs, "guard.spike=rollback", "guard.max_rollbacks=2")
    assert code == errors.DONE, second
    assert "Traceback" not in first + second
    check_listed(back)

    code, text = shop.run(f"{name}-skip", *knobs, "guard.spike=skip")
    assert code == errors.DONE, text
    for step in POISONED:
        assert f"Step {step}: the loss rose to" in text
    assert "its update was dropped on all ranks" in text
    skip = result(shop.folder / f"{name}-skip")["metrics"]
    assert (skip["skipped"], skip["spikes"], skip["rollbacks"]) == (2, 2, 0)

    code, text = shop.run(f"{name}-warn", *knobs, "guard.spike=warn")
    assert code == errors.DONE, text
    assert "Step 18: the loss rose to" in text
    warned = result(shop.folder / f"{name}-warn")["metrics"]
    assert warned["skipped"] == 0
    assert warned["spikes"] >= 1

    losses, weights = pool(2).run(without, back, POISONED)[0]
    assert curve(back) == the_others(losses)
    assert same_weights(back, weights)
    assert same_weights(shop.folder / f"{name}-skip", weights)
    assert not same_weights(shop.folder / f"{name}-warn", weights)
