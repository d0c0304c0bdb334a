"""The benchmark against other programs works: a toy cell end to end, and the verdicts on numbers that are known."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import peers_figures  # noqa: E402
from adapters.observer import sitecustomize  # noqa: E402
from peers_cases import Bar, cells  # noqa: E402
from peers_figures import Entry  # noqa: E402
from peers_measure import Measured, by_step  # noqa: E402


def test_a_toy_cell_is_measured_from_start_to_end(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--toy", "--here", "--programs", "distft,Trainer",
        "--steps", "2", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "peers.json"),
    ]  # fmt: skip
    environment = {**os.environ, "DISTFT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "peers.json").read_text())
    ours, trainer = report["entries"]
    assert [ours["program"], trainer["program"]] == ["distft", "Trainer"]
    for entry in (ours, trainer):
        (run,) = entry["runs"]
        assert abs(run["losses"][0] - math.log(1_000)) < 0.2, "the same model, not trained yet"
        assert len(run["losses"]) == 2
        assert run["start"] > run["seconds_per_step"] > 0
        assert run["memory"] > 0.98 * run["memory_training"] > 100e6  # the kernel counts each a little late
        assert 0.4 < run["supervised_per_step"] / run["tokens_per_step"] < 0.75
    assert 1_900 < ours["median"]["tokens_per_step"] <= 2_048
    ratio = ours["median"]["supervised_per_second"] / trainer["median"]["supervised_per_second"]
    assert report["ratios"] == {"toy": pytest.approx(ratio)}


def entry(program: str, rate: float, memory: int, setting: str = "packed") -> Entry:
    run = Measured(2 * rate, rate, 1.0, 1.0, 2 * rate, rate, memory, memory, 10.0, [7.0])
    return Entry("cell", program, setting, "", [run, replace(run, supervised_per_second=rate * 100), run])


def test_bars_are_judged_at_each_setting_against_the_best_of_the_others() -> None:
    entries = [
        entry("distft", 40.0, 60), entry("TRL", 5.0, 100), entry("TRL", 20.0, 90, "other"), entry("Trainer", 10.0, 80),
    ]  # fmt: skip
    bars = (Bar("cell", "supervised_per_second", ("TRL", "Trainer"), 2.0), Bar("cell", "memory", ("TRL",), 0.66))
    told = peers_figures.bar_lines(bars, entries)[1:]
    assert [line[3] for line in told] == ["TRL (other)"] * 2
    assert [line[5:] for line in told] == [["2.00 x", "held"], ["0.67 x", "MISSED"]]
    leaner = [*entries, entry("distft", 39.0, 40, "lean")]
    told = peers_figures.bar_lines(bars, leaner)[1:]
    assert [(line[0], line[-1]) for line in told] == [
        ("packed", "held"), ("packed", "MISSED"), ("lean", "MISSED"), ("lean", "held"),
    ], "each setting of ours by itself"  # fmt: skip
    assert peers_figures.cell_ratio("cell", entries[1:]) is None


def test_what_is_counted_are_products_and_attention() -> None:
    import torch
    from adapters.observer.operations import Operations

    from distft.model.lora import adapted_linear

    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    with Operations() as linear:
        torch.nn.functional.linear(x, weight).sum().backward()
    with Operations() as attention:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    with Operations() as in_place, torch.no_grad():
        torch.zeros(10, 6).addmm_(x, weight.t())
    with Operations() as adapted:
        adapted_linear(x, [weight.detach()], [None], [a], [b], [1.0])[0].sum().backward()
    assert linear.total == 3 * 2 * 10 * 8 * 6
    assert attention.total == 7 * 2 * 2 * 16 * 16 * 8  # two products forward, five backward
    assert in_place.total == 2 * 10 * 6 * 8
    assert adapted.total == 2 * 10 * (2 * 8 * 6 + 3 * 8 * 2 + 3 * 2 * 6)  # the frozen weight has no gradient


def test_steps_of_another_size_are_told() -> None:
    alike = [entry("distft", 50.0, 60), entry("TRL", 41.0, 100)]
    assert peers_figures.uneven(alike) == []
    (told,) = peers_figures.uneven([*alike, entry("Trainer", 300.0, 80)])
    assert told.startswith("cell compares unlike work")
    assert told.endswith("TRL (packed) 82, distft (packed) 100, Trainer (packed) 600")


def test_close_cells_are_told_with_their_operations() -> None:
    entries = [entry("distft", 40.0, 60), entry("TRL", 20.0, 100), entry("Trainer", 38.0, 80)]
    [(ours, rival)] = peers_figures.pairs(entries, peers_figures.CLOSE)
    assert (ours.program, rival.program) == ("distft", "Trainer")
    assert peers_figures.pairs([entries[0], entries[1]], peers_figures.CLOSE) == []
    [line] = peers_figures.operation_lines([(ours, 2e6, rival, 3e6)])[1:]
    assert line[2:] == ["3.0", "2.0", "1.50 x", "1.05 x"]


def test_the_fastest_setting_that_was_tried_is_measured() -> None:
    tried = {
        ("a", "TRL", "x"): 1.0, ("a", "TRL", "y"): 2.0, ("b", "TRL", "x"): 3.0, ("b", "TRL", "y"): 2.0,
        ("a", "distft", "x"): 1.0, ("a", "distft", "y"): 2.0,
    }  # fmt: skip
    ours = {("a", "distft", "x"), ("a", "distft", "y")}
    assert peers.left(tried, ["TRL"]) == {("a", "TRL", "y"), ("b", "TRL", "x"), *ours}
    assert peers.left(tried, [""]) == set(tried)


def test_batches_are_put_to_their_steps() -> None:
    records = [{"batches_per_step": 2}, *({"tokens": n, "supervised": 1} for n in (1, 2, 3, 4, 99)), {"step": 1}]
    assert by_step(records, 2) == ([3, 7], [2, 2])


def test_padding_and_what_carries_no_loss_are_not_counted() -> None:
    import torch

    features = [{"attention_mask": [1, 1, 2, 0]}, {"attention_mask": [1, 0, 0, 0]}]
    labels = torch.tensor([[5, -100, 7, 8], [5, -100, -100, -100]])
    assert sitecustomize.count(features, {"labels": labels}) == {"tokens": 4, "supervised": 2}
    assert sitecustomize.count([{"input_ids": [1, 2, 3]}], {"labels": labels[:1]}) == {"tokens": 3, "supervised": 2}


def test_every_cell_has_a_name_of_its_own_and_known_settings() -> None:
    from peers_measure import settings_of

    assert len(cells()) > 15
    for case in cells().values():
        for program, settings in case.entrants.items():
            assert set(settings) <= set(settings_of(program)), case.name
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "no such cell"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "unknown: no such cell" in done.stderr
