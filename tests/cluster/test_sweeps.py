"""A search that is killed and goes on, with a trial that is pruned and one that fails; and its page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from distft import errors
from tests.faults.runs import ROOT, Shop, Started, records, result
from tests.required import cannot
from tests.unit.test_report import add_job

WORDS = [
    "-m", "hydra/sweeper=optuna", "hydra/launcher=side_by_side", "sweep.sampler=grid", "sweep.seed=5",
    "sweep.pruner=median", "sweep.prune_after_trials=1", "optim.lr=0.05,0,1e30", "strategy=ddp", "max_steps=300",
    "eval.every=20", "data.eval_fraction=0.2",
]  # fmt: skip


@dataclass
class Swept:
    """A sweep that ended, and what it printed: before it was killed, and after."""

    folder: Path
    code: int
    before: str
    after: str


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    shop = Shop.open(tmp_path_factory.mktemp("sweep"))
    folder = shop.folder / "sweep"
    words = [word for word in shop.words("none", *WORDS) if not word.startswith("run.dir=")]
    command = [sys.executable, str(ROOT / "train.py"), *words, f"hydra.sweep.dir={folder}"]

    def start() -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=shop.folder
        )

    first = start()
    try:
        Started(first, folder / "0").wait_for_step(30)
    finally:
        first.send_signal(signal.SIGKILL)
    before = first.communicate(timeout=60)[0]
    second = start()
    try:
        after = second.communicate(timeout=200)[0]
    finally:
        if second.poll() is None:
            second.terminate()
    return Swept(folder, second.returncode, before, after)


def test_a_killed_search_goes_on(swept: Swept) -> None:
    assert "0 of 3 trials" in swept.before
    assert "trial 0 was interrupted; it goes on" in swept.after
    assert len((swept.folder / "0" / "command.txt").read_text().splitlines()) == 2
    assert len((swept.folder / "1" / "command.txt").read_text().splitlines()) == 1
    steps = [record["step"] for record in records(swept.folder / "0")]
    assert steps == list(range(1, 301)), "every step once, those before the kill too"
    assert re.search(r"Going on after step \d+ of 300", (swept.folder / "logs" / "0.log").read_text())
    import optuna

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{swept.folder / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", *STATES]
    assert study.trials[0].value == result(swept.folder / "0")["metrics"]["best"]
    assert study.trials[0].params == {"optim.lr": "0.05"}


STATES = ["PRUNED", "FAIL"]


def test_a_worse_trial_ends_as_pruned_and_a_failed_one_ends_nothing(swept: Swept) -> None:
    pruned = result(swept.folder / "1")
    assert (pruned["status"], pruned["final"]) == ("pruned", None)
    assert 20 <= pruned["steps"] < 300
    assert "eval/loss" in pruned["reason"]
    assert not (swept.folder / "1" / "final").exists()
    assert not (swept.folder / "1" / "prune.txt").exists()
    assert result(swept.folder / "2")["status"] == "stopped_by_guard"
    notes = [json.loads(line) for line in (swept.folder / "jobs.jsonl").read_text().splitlines()]
    assert [(note["job"], note["status"], note["exit_code"]) for note in notes] == [
        (0, "done", 0),
        (1, "pruned", 0),
        (2, "failed", errors.STOPPED_BY_GUARD),
    ]
    assert swept.code == errors.STOPPED_BY_GUARD
    assert "1 of 3 jobs of the sweep failed: job 2 (optim.lr=1e+30): 4" in swept.after
    assert f"distft report {swept.folder}" in swept.after


def test_the_same_command_once_more_runs_nothing(swept: Swept) -> None:
    """And one of another search is refused."""
    words = (swept.folder / "multirun.yaml").read_text()
    assert "optim.lr=0.05,0,1e30" in words
    shop = Shop(swept.folder.parent)
    plain = [word for word in shop.words("none", *WORDS) if not word.startswith("run.dir=")]
    command = [sys.executable, str(ROOT / "train.py"), *plain, f"hydra.sweep.dir={swept.folder}"]
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert "3 of 3 trials: 1 complete, 1 failed, 1 pruned" in again.stdout
    assert "on core" not in again.stdout, "no job was started"
    other = subprocess.run([*command, "max_steps=5"], capture_output=True, text=True, check=False, timeout=100)
    assert other.returncode == errors.USER_MISTAKE
    assert "max_steps=300, not 5" in other.stderr


@dataclass
class Page:
    """A page as a browser has drawn it."""

    body: str  # the document behind its scripts
    told: str  # on the terminal
    picture: Path

    def section(self, name: str) -> str:
        """What stands in a section, its drawing included; empty where the page has none."""
        start = self.body.find(f'id="{name}"')
        return self.body[start : self.body.index('<p class="note">', start)] if start >= 0 else ""


def drawn(sweep: Path, folder: Path) -> Page:
    browser = shutil.which("chromium")
    if browser is None:
        cannot("cluster", "there is no chromium")
    page, picture = folder / "page.html", folder / "page.png"
    command = [sys.executable, "-m", "distft", "report", str(sweep), f"report.output={page}"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    chromium = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    chromium += ["--virtual-time-budget=20000", "--window-size=1300,2600", page.as_uri()]
    seen = subprocess.run([*chromium, "--dump-dom"], capture_output=True, text=True, check=True, timeout=100).stdout
    subprocess.run([*chromium, f"--screenshot={picture}"], capture_output=True, check=True, timeout=100)
    assert picture.stat().st_size > 50_000, "more than an empty page"
    return Page(seen[seen.rindex("<body") :], told.stdout, picture)


def num_traces(section: str) -> int:
    return len(re.findall(r'class="trace scatter trace', section))


def test_the_page_of_the_search_is_drawn_by_a_browser(swept: Swept, tmp_path: Path) -> None:
    page = drawn(swept.folder, tmp_path)
    assert "One setting alone" in page.told, "two of three did not come to their end"
    assert num_traces(page.section("evaluation")) == 2, "the failed trial made none"
    assert num_traces(page.section("training")) == 3
    assert page.section("jobs-and-their-knobs") == "", "there is one job alone to be drawn"
    assert all(f"<td>{state}</td>" in page.body for state in ("done", "pruned", "failed (4)"))


def test_every_figure_is_drawn_by_a_browser(tmp_path: Path) -> None:
    """Of a sweep with repeated seeds, with a value that tries to be more than text."""
    sweep = tmp_path / "sweep"
    for number in range(9):
        rate, seed = 10.0 ** (number // 3 - 4), number % 3
        add_job(sweep, number, [f"optim.lr={rate}", f"seed={seed}"], [3 + rate, 2 + 9 * rate + 1e-4 * seed])
    add_job(sweep, 9, ["optim.lr=0.5", "seed=0"], [8.0], "failed", errors.STOPPED_BY_GUARD)  # its reason is a script
    page = drawn(sweep, tmp_path)
    assert "Winner: optim.lr=0.0001" in page.told
    assert (num_traces(page.section("evaluation")), num_traces(page.section("training"))) == (10, 10)
    assert num_traces(page.section("jobs-and-their-knobs")) == 9, "a line a job that ended"
    assert 'class="trace bars"' in page.section("importance-of-each-knob")
    assert num_traces(page.section("spread-over-seeds")) == 6, "values and mean of three settings"
    assert "&lt;img src=x onerror=alert(1)&gt;" in page.body
    assert "<img" not in page.body
