"""A run that its sweep asks to end: all ranks after the same step, in good order and without a final model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distft.launch import prune
from tests.faults.jobs import run_of, trained
from tests.faults.runs import Shop, records, result
from tests.pool import Pool


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_all_ranks_end_after_the_same_step(pool: Callable[[int], Pool], tmp_path: Path, strategy: str) -> None:
    shop = Shop.open(tmp_path, num_rows=24)
    words = [f"strategy={strategy}", "max_steps=40", "eval.every=4", "data.eval_fraction=0.2"]
    run = run_of(shop.words("run", *words))
    folder = tmp_path / "run"
    folder.mkdir()
    prune.request(folder, "sweep.pruner=median: a reason")
    ranks = pool(2).run(trained, run, folder)
    ended = result(folder)
    assert (ended["status"], ended["reason"], ended["final"]) == ("pruned", "sweep.pruner=median: a reason", None)
    assert 1 <= ended["steps"] <= 3, "seen at the first step, agreed on behind it"
    assert [record["step"] for record in records(folder)] == list(range(1, ended["steps"] + 1))
    assert [len(seen) for seen in ranks] == [ended["steps"]] * 2
    assert not (folder / "final").exists()
    assert not (folder / prune.REQUEST).exists(), "heeded: whoever goes on with this run is not ended again"
