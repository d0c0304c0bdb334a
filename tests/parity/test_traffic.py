"""What the engines put on the wire: no more than they must, in the precision asked, and the dials change no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.wire import BAR, STRATEGIES, TOY, Counter, build, least, micro_batch, step
from benchmarks.wire import Case as Traffic
from distft.errors import UserMistake
from distft.world import World
from tests.parity.engine import Case, prepared, run_case, train
from tests.parity.reference import Recipe, reference
from tests.parity.test_parity import BOUND, differences
from tests.pool import Pool

RECIPE = Recipe()
DIALS: list[tuple[str, int, tuple[tuple[str, Any], ...]]] = [
    ("fsdp", 2, (("reshard_after_forward", False),)),
    ("fsdp", 2, (("reshard_after_forward", True), ("gradient_sync", "each"))),
    ("fsdp", 4, (("reshard_after_forward", 2),)),
    ("hsdp", 4, (("reshard_after_forward", False), ("gradient_sync", "each"))),
]


# --- bytes ----------------------------------------------------------------------------------------------------------


def payload(world: World, case: Traffic, more: int = 0) -> tuple[int, int, int]:
    """Bytes of the second step, the least for it, and how many collectives it took; `more`: values reduced besides."""
    strategy, parts = build(case, TOY, world)
    batch = micro_batch(TOY)
    step(strategy, batch, case.accumulation)
    with Counter() as counter:
        step(strategy, batch, case.accumulation)
        if more:
            dist.all_reduce(torch.zeros(more))
    gradient = 2 if dict(case.words).get("communication") == "bf16" else 4
    return sum(call.payload for call in counter.calls), least(case, parts, gradient, 4), len(counter.calls)


@pytest.mark.parametrize(("tuning", "accumulation"), [("full", 4), ("lora", 1)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_moves_the_least(pool: Callable[[int], Pool], strategy: str, tuning: str, accumulation: int) -> None:
    for moved, wanted, _ in pool(2).run(payload, Traffic(strategy, tuning, accumulation)):
        assert wanted <= moved <= BAR * wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_travel_in_bf16_if_asked(pool: Callable[[int], Pool], strategy: str) -> None:
    low = Traffic(strategy, "full", 1, (("communication", "bf16"),))
    moved, wanted, _ = pool(2).run(payload, low)[0]
    assert wanted <= moved <= BAR * wanted


@pytest.mark.parametrize("words", [("reshard_after_forward", False), ("gradient_sync", "each")])
def test_dials_move_what_they_say(pool: Callable[[int], Pool], words: tuple[str, Any]) -> None:
    moved, wanted, _ = pool(2).run(payload, Traffic("fsdp", "full", 4, (words,)))[0]
    assert wanted <= moved <= BAR * wanted


def test_more_than_the_least_is_seen(pool: Callable[[int], Pool]) -> None:
    """Negative controls: another reduction, and blocks gathered more often than the formula says."""
    plain = Traffic("ddp", "full", 1)
    moved, wanted, _ = pool(2).run(payload, plain, 10_000)[0]
    assert moved > BAR * wanted
    eager = Traffic("fsdp", "full", 4, (("reshard_after_forward", True),))
    moved, wanted, _ = pool(2).run(payload, eager)[0]
    assert moved > BAR * wanted


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "num_ranks", "options"), DIALS)
def test_dials_change_no_number(
    pool: Callable[[int], Pool], strategy: str, num_ranks: int, options: tuple[tuple[str, Any], ...]
) -> None:
    outcome = pool(num_ranks).run(run_case, Case(strategy, 4, RECIPE, options=options))[0]
    found = differences(outcome, reference(RECIPE), RECIPE)
    assert max(found.values()) < BOUND, found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_in_bf16_are_rounded_and_no_more(pool: Callable[[int], Pool], strategy: str) -> None:
    """Sums over micro-batches stay in fp32: the error is that of one rounding, 2^-8 of a value at most, and a sum's."""
    case = Case(strategy, 4, RECIPE, options=(("communication", "bf16"),))
    found = differences(pool(2).run(run_case, case)[0], reference(RECIPE), RECIPE)
    assert BOUND < found["gradients"] < 2**-7, found
    assert found["loss"] < 2**-7


def last_losses(world: World, options: tuple[tuple[str, Any], ...]) -> float:
    """A loss without gradients, a step, another loss: nothing that was gathered before the step is used behind it."""
    from distft.objective.trainee import LossRequest, LossSums
    from tests.parity.engine import NUM_SOURCES, rows
    from tests.parity.reference import documents

    strategy = prepared(world, Case("fsdp", 1, Recipe(lr=0.5), options=options))
    request = LossRequest(rows(documents()[0][:3]), 1.0, 1.0, NUM_SOURCES)

    def evaluated() -> float:
        with torch.no_grad():
            answer = strategy.forward(request)
        assert isinstance(answer, LossSums)
        return float(answer.nll.sum())

    evaluated()
    train(strategy, world, Case("fsdp", 1, Recipe(lr=0.5), options=options), 0)
    return evaluated()


def test_what_stays_gathered_is_not_used_behind_a_step(pool: Callable[[int], Pool]) -> None:
    kept = pool(2).run(last_losses, (("reshard_after_forward", False),))
    dropped = pool(2).run(last_losses, (("reshard_after_forward", True),))
    assert kept == pytest.approx(dropped, rel=1e-6)


def test_a_group_that_does_not_divide_the_ranks_is_refused(pool: Callable[[int], Pool]) -> None:
    with pytest.raises(UserMistake, match=r"reshard_after_forward=3 does not divide the 4 ranks.*one of 2, 4"):
        pool(4).run(prepared, Case("fsdp", options=(("reshard_after_forward", 3),)))
