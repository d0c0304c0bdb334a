"""Compiled blocks compute what the plain loop does, under every engine that takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.engine import Case, run_case
from tests.parity.reference import Recipe, reference
from tests.parity.test_parity import BOUND, differences
from tests.pool import Pool


@pytest.mark.parametrize(("strategy", "tuning"), [("ddp", "full"), ("fsdp", "full"), ("zero2", "full")])
def test_compiled_blocks_equal_the_plain_loop(pool: Callable[[int], Pool], strategy: str, tuning: str) -> None:
    recipe = Recipe(tuning=tuning)
    case = Case(strategy, 1, recipe, layout="packed", backend="aot_eager", checkpointing="full")
    outcome = pool(2).run(run_case, case)[0]
    found = differences(outcome, reference(recipe), recipe)
    assert max(found.values()) < BOUND, found
