"""What a report says of a sweep's folder: states, knobs, curves, the rule of a winner, a page without surprises."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distft import errors
from distft.config.load import compose, write_snapshot
from distft.errors import UserMistake
from distft.launch.jobs import note_job
from distft.report.importance import importance
from distft.report.page import page
from distft.report.read import Job, SweepFolder, read
from distft.report.verdict import Setting, decide, settings_of
from distft.verbs.report import main

EVIL = "</script><img src=x onerror=alert(1)>&'\""


def add_job(
    sweep: Path, number: int, words: Sequence[str], losses: Sequence[float], status: str = "done", code: int = 0
) -> None:
    """A job as a run leaves it."""
    folder = sweep / str(number)
    folder.mkdir(parents=True)
    run = compose([*words, "data=jsonl", "data.path=rows.jsonl"]).run
    write_snapshot(run, folder / "config.yaml")
    lines = []
    for step, loss in enumerate(losses, 1):
        lines.append({"step": step, "split": "train", "loss": loss + 1})
        lines.append({"step": step, "split": "eval", "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    best = min(losses, default=None)
    metrics = {"best": best, "best_step": losses.index(best) + 1 if best is not None else None}
    result = {"status": status, "reason": None if code == 0 else EVIL, "steps": len(losses), "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))
    note_job(sweep, number, words, folder, code)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two learning rates with three seeds each, a failed job, a pruned one and one that was killed."""
    folder = tmp_path / "sweep"
    for number, (rate, seed) in enumerate((rate, seed) for rate in (1e-3, 1e-2) for seed in (1, 2, 3)):
        base = 2.0 if rate == 1e-3 else 1.0
        add_job(folder, number, [f"optim.lr={rate}", f"seed={seed}"], [base + 1, base + 0.01 * seed])
    add_job(folder, 6, ["optim.lr=1.0", "seed=1"], [9.0], "failed", errors.STOPPED_BY_GUARD)
    add_job(folder, 7, ["optim.lr=0.5", "seed=1"], [8.0], "pruned")
    add_job(folder, 8, ["optim.lr=0.2", "seed=1"], [7.0, 6.0])
    (folder / "8" / "result.json").unlink()
    notes = (folder / "jobs.jsonl").read_text().splitlines(keepends=True)
    (folder / "jobs.jsonl").write_text("".join(notes[:8]) + notes[8][:20])  # killed while it wrote
    note_job(folder, 9, ["optim.lr=-1", "seed=1"], folder / "9", errors.USER_MISTAKE)  # never began
    return folder


def test_a_sweeps_folder_is_read(sweep: Path) -> None:
    found = read(sweep)
    states = [job.state for job in found.jobs]
    assert states == [*["done"] * 6, "failed", "pruned", "interrupted", "failed"]
    assert (found.knobs, found.settings) == (["optim.lr", "seed"], ["optim.lr"])
    assert found.jobs[0].values == {"optim.lr": 1e-3, "seed": 1}
    assert float(found.jobs[9].values["optim.lr"]) == -1, "known by its words alone"
    assert found.jobs[0].evaluation == [(1, 3.0), (2, 2.01)]
    assert found.jobs[0].train == [(1, 4.0), (2, 3.01)]
    assert [job.number for job in found.ranked()] == [3, 4, 5, 0, 1, 2]
    assert found.jobs[8].objective == 6.0
    verdict = decide(settings_of(found), found.smaller_is_better)
    assert verdict.winner is not None
    assert verdict.winner.words == "optim.lr=0.01"
    assert "Welch" in verdict.sentence


def test_a_running_job_is_told_as_running(tmp_path: Path) -> None:
    from distft.launch import lock

    add_job(tmp_path, 0, ["seed=1"], [2.0])
    add_job(tmp_path, 1, ["seed=2"], [3.0])
    (tmp_path / "1" / "result.json").unlink()
    (tmp_path / "jobs.jsonl").write_text((tmp_path / "jobs.jsonl").read_text().splitlines()[0] + "\n")
    holder = lock.Holder.here()
    (tmp_path / "1" / lock.LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    assert [job.state for job in read(tmp_path).jobs] == ["done", "running"]
    gone = dataclasses.replace(holder, start="1")
    (tmp_path / "1" / lock.LOCK).write_text(json.dumps(dataclasses.asdict(gone)))
    assert [job.state for job in read(tmp_path).jobs] == ["done", "interrupted"]


def test_what_only_follows_from_a_choice_is_no_knob_of_the_sweep(tmp_path: Path) -> None:
    add_job(tmp_path, 0, ["tuning=full", "seed=1"], [2.0])
    add_job(tmp_path, 1, ["tuning=lora", "tuning.lora_rank=4", "seed=1"], [2.0])
    add_job(tmp_path, 2, ["tuning=lora", "tuning.lora_rank=8", "seed=1"], [2.0])
    add_job(tmp_path, 3, ["optim=sgd", "seed=1"], [2.0])
    assert read(tmp_path).knobs == ["tuning.method", "tuning.lora_rank", "optim.name"]


@pytest.mark.parametrize("name", ["nowhere", "run", "empty"])
def test_what_is_no_sweep_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    add_job(tmp_path / "runs", 0, ["seed=1"], [1.0])
    (tmp_path / "runs" / "0").rename(tmp_path / "run")
    with pytest.raises(UserMistake):
        read(tmp_path / name)


def a_setting(words: str, values: Sequence[float]) -> Setting:
    return Setting(words, (), tuple(values))


def drawn(means: Sequence[float], seeds: int, random_numbers: random.Random) -> list[Setting]:
    """Settings with noise of standard deviation 1, the best mean first."""
    draws = [[random_numbers.gauss(mean, 1) for _ in range(seeds)] for mean in means]
    return sorted((a_setting(str(n), values) for n, values in enumerate(draws)), key=lambda one: one.mean)


@pytest.mark.parametrize("num_settings", [2, 6])
def test_no_winner_is_named_inside_the_noise(num_settings: int) -> None:
    """The rule's promise: settings that are equal, and one has a winner in at most 5 % of all sweeps."""
    source = random.Random(3)
    named = sum(decide(drawn([0.0] * num_settings, 3, source), True).winner is not None for _ in range(400))
    assert named <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)


def test_a_lowest_mean_alone_would_name_one_each_time() -> None:
    """Negative control of the test above, and of the rule: a real difference is seen."""
    source = random.Random(3)
    assert all(drawn([0.0] * 6, 3, source)[0].mean < 1 for _ in range(10))
    wins = [decide(drawn([0.0, 8.0, 9.0], 4, source), True).winner for _ in range(50)]
    assert sum(winner is not None and winner.words == "0" for winner in wins) > 45


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "nothing to compare"),
        ([a_setting("a", [1.0, 1.1])], "One setting alone"),
        ([a_setting("a", [1.0]), a_setting("b", [9.0])], "the noise is unknown"),
        ([a_setting("a", [1.0]), a_setting("b", [9.0, 9.1])], "a has the lowest value"),
        ([a_setting("a", [1.0, 1.1]), a_setting("b", [9.0])], "only a was repeated"),
        ([a_setting("a", [1.0, 1.2]), a_setting("b", [1.1, 1.3])], "within the noise"),
        ([a_setting("a", [1.0, 1.0]), a_setting("b", [2.0, 2.0])], "within the noise"),  # seeds that change nothing
    ],
)
def test_why_there_is_no_winner(settings: list[Setting], words: str) -> None:
    verdict = decide(settings, True)
    assert verdict.winner is None
    assert words in verdict.sentence


def test_larger_may_be_better() -> None:
    settings = [a_setting("a", [9.0, 9.1, 9.05]), a_setting("b", [1.0, 1.1, 1.2])]
    assert decide(settings, smaller_is_better=False).winner == settings[0]


def test_the_knob_that_matters_is_the_important_one(tmp_path: Path) -> None:
    source = random.Random(0)
    jobs = []
    for number in range(40):
        values: dict[str, Any] = {"optim.lr": 10 ** source.uniform(-5, -2)}
        values["optim.name"] = source.choice(["adamw", "sgd"])
        loss = (math.log10(values["optim.lr"]) + 3) ** 2 + 0.001 * source.random()
        jobs.append(Job(number, tmp_path, "done", 0, None, loss, 1, 1, [], {}, values=values))
    shares = importance(SweepFolder(tmp_path, jobs, ["optim.lr", "optim.name"], "eval/loss", True))
    assert shares["optim.lr"] > 0.8
    assert importance(SweepFolder(tmp_path, jobs[:2], ["optim.lr"], "eval/loss", True)) == {}


def test_a_page_is_whole_and_no_value_is_more_than_text(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distft.config.schema.report import ReportOn

    assert main(ReportOn(), str(sweep)) == 0
    told = capsys.readouterr().out
    assert "Winner: optim.lr=0.01" in told
    assert f"--config-dir {sweep / '3'} --config-name config" in told
    text = (sweep / "report.html").read_text()
    assert EVIL not in text
    assert "<img" not in text.partition("</script></head>")[2]
    assert "default-src 'none'" in text
    outside = text.partition("</script></head>")[2]
    assert "src=" not in outside.replace("src=x onerror", "")
    found = read(sweep)
    for job in found.jobs:
        job.values["optim.lr"] = EVIL
    evil = page(found, settings_of(found), decide(settings_of(found), True), {EVIL: 1.0})
    body = evil.partition("</script></head>")[2]
    assert "<img" not in body
    assert EVIL not in evil


def test_a_page_that_cannot_be_written_is_told(sweep: Path) -> None:
    from distft.config.schema.report import Report, ReportOn

    with pytest.raises(UserMistake, match=r"report\.output"):
        main(ReportOn(Report(output=str(sweep / "nowhere" / "page.html"))), str(sweep))
