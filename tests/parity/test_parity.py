"""The same documents give the same loss, gradient norm, gradients and parameters whatever computes them.

Every strategy, number of ranks and accumulation split against one plain loop (`reference.py`), in fp32 to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.parity.engine import Case, run_case
from tests.parity.reference import Outcome, Recipe, reference
from tests.pool import Pool

BOUND = 1e-5
LAYOUTS = [
    (strategy, num_ranks)
    for strategy in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
    for num_ranks in (1, 2)
] + [("hsdp", 4)]
RECIPES = {
    "full-sgd": Recipe(),
    "full-sgd-tied-clipped": Recipe(tied=True, clip=1.5),
    "full-adamw": Recipe(optimizer="adamw", lr=0.01),
    "lora-sgd": Recipe(tuning="lora"),
    "lora-adamw-tied-clipped": Recipe(tuning="lora", optimizer="adamw", lr=0.01, tied=True, clip=1.0),
}


def differences(outcome: Outcome, expected: Outcome, recipe: Recipe) -> dict[str, float]:
    """Largest relative differences. A gradient is read off plain SGD's first step, relative to the norm of all."""
    assert set(outcome.last) == set(expected.last)
    found = {
        "loss": relative(torch.tensor(outcome.losses), torch.tensor(expected.losses)),
        "norm": relative(torch.tensor(outcome.norms), torch.tensor(expected.norms)),
        "parameters": apart(outcome.last, expected.last) / size(expected.last),
    }
    if recipe.optimizer == "sgd":
        clipped = min(recipe.clip or expected.norms[0], expected.norms[0])
        found["gradients"] = apart(outcome.first, expected.first) / recipe.lr / clipped
    return found


def relative(values: Tensor, expected: Tensor) -> float:
    return float(((values.double() - expected) / expected).abs().max())


def apart(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return size({name: values[name].double() - expected[name] for name in expected})


def size(values: dict[str, Tensor]) -> float:
    return float(torch.cat([value.double().flatten() for value in values.values()]).norm())


@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("strategy", "num_ranks"), LAYOUTS)
def test_every_engine_equals_the_plain_loop(
    pool: Callable[[int], Pool], strategy: str, num_ranks: int, accumulation: int, recipe_name: str
) -> None:
    recipe = RECIPES[recipe_name]
    expected = reference(recipe)
    outcomes = pool(num_ranks).run(run_case, Case(strategy, accumulation, recipe))
    found = differences(outcomes[0], expected, recipe)
    assert max(found.values()) < BOUND, found
    for other in outcomes[1:]:
        assert (other.losses, other.norms) == (outcomes[0].losses, outcomes[0].norms)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_mean_of_means_is_noticed(pool: Callable[[int], Pool], num_ranks: int) -> None:
    """Negative control: every micro-batch scaled by its own count, as if all had the same number of targets."""
    recipe = RECIPES["full-sgd"]
    outcome = pool(num_ranks).run(run_case, Case("ddp", 4, recipe, mean_of_means=True))[0]
    found = differences(outcome, reference(recipe), recipe)
    assert found["gradients"] > 1000 * BOUND
    assert found["norm"] > 1000 * BOUND


def test_adamw_hides_a_wrong_scale_and_sgd_does_not(pool: Callable[[int], Pool]) -> None:
    """Why parity runs on SGD as well: twice the gradient leaves AdamW's parameters almost where they were."""
    off = {}
    for name in ("full-sgd", "full-adamw"):
        outcome = pool(1).run(run_case, Case("ddp", 1, RECIPES[name], wrong_factor=2.0))[0]
        off[name] = differences(outcome, reference(RECIPES[name]), RECIPES[name])["parameters"]
    assert off["full-sgd"] > 1000 * BOUND
    assert off["full-adamw"] < off["full-sgd"] / 100
