"""Jobs of a sweep at the same time, each with devices of its own; a signal to the sweep is one to its jobs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distft import errors
from distft.launch.start import quoted
from tests.faults.runs import ROOT, Shop, Started, records, result

CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("side-by-side"))


def command(shop: Shop, *words: str) -> list[str]:
    plain = [word for word in shop.words("none", "strategy=ddp", *words) if not word.startswith("run.dir=")]
    return [sys.executable, str(ROOT / "train.py"), "-m", *plain]


@pytest.mark.skipif(len(CORES) < 2, reason="two jobs at once need two cores")
def test_two_jobs_run_at_once_and_are_stopped_together(shop: Shop) -> None:
    """Both are there before either ends; SIGTERM saves both; the same command goes on with both."""
    folder = shop.folder / "sweep"
    words = command(shop, "sweep.jobs=2", "seed=1,2", "max_steps=100000", f"hydra.sweep.dir={folder}")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    sweep = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        started = Started(sweep, folder)
        started.wait_for(lambda: all(records(folder / str(job)) for job in (0, 1)))
        sweep.send_signal(signal.SIGTERM)
        text, _ = sweep.communicate(timeout=100)
    finally:
        if sweep.poll() is None:
            sweep.kill()
    assert sweep.returncode == errors.SAVED_AFTER_SIGNAL, text
    told = dict(re.findall(r"job (\d) on cores? ([\d,]+): seed=", text))
    cores = {job: set(said.split(",")) for job, said in told.items()}
    assert len(cores) == 2
    assert not cores["0"] & cores["1"], "no core twice"
    for job in (0, 1):
        environment_text = (folder / str(job) / "environment.txt").read_text()
        assert f"cores: {len(CORES) // 2}" in environment_text, "its processes are kept to them"
        ended = result(folder / str(job))
        assert ended["status"] == "saved_after_signal"
        assert (folder / str(job) / "checkpoints" / f"step-{ended['steps']:06d}").is_dir()
        assert f"seed={job + 1}" in (folder / str(job) / "command.txt").read_text()
    notes = [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]
    assert sorted((note["job"], note["status"]) for note in notes) == [(0, "interrupted"), (1, "interrupted")]


def test_a_dry_run_prints_each_jobs_command(shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = command(shop, "hydra/launcher=side_by_side", "seed=1,2", "launch.dry_run=true", f"hydra.sweep.dir={folder}")
    told = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert told.returncode == 0, told.stderr
    commands = [line for line in told.stdout.splitlines() if "-m distft train" in line]
    assert len(commands) == 2
    for job, line in enumerate(commands):
        assert f"run.dir={quoted(str(folder / str(job)))}" in shlex.split(line)
    assert not list(folder.glob("*/config.yaml"))


def test_a_dry_run_of_a_search_shows_its_first_trial(shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    search = ["hydra/sweeper=optuna", "hydra/launcher=side_by_side", "optim.lr=tag(log, interval(1e-5, 1e-3))"]
    words = command(shop, *search, "launch.dry_run=true", f"hydra.sweep.dir={folder}")
    told = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert told.returncode == 0, told.stderr
    assert "# 20 trials of sweep.sampler=tpe, sweep.pruner=none. The first:" in told.stdout
    assert re.search(r"^# optim\.lr=[\d.e-]+$", told.stdout, re.MULTILINE)
    assert not (folder / "study.db").exists()
