"""The life of a run: stopped and taken up again, stopped by a guard, stopped early, refused when it is another run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distft import errors
from tests.small_run import SMALL, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("life")
    write_rows(folder / "rows.jsonl")
    return folder


def start(shop: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    small = [word for word in SMALL if not word.startswith("eval.")]
    command = [
        sys.executable, str(ROOT / "train.py"), *small, "data=jsonl", f"data.path={shop / 'rows.jsonl'}",
        f"data.cache_dir={shop / 'cache'}", f"run.dir={shop / name}", "log.every=1", "strategy=ddp", "eval.samples=0",
        *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def wait_for_records(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["split"] == split]


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(shop: Path) -> None:
    knobs = ("max_steps=400", "tuning=lora", "tuning.lora_dropout=0.1", "eval.at_start=false")
    stopped = start(shop, "stopped", *knobs)
    wait_for_records(stopped, shop / "stopped", 5)
    stopped.send_signal(signal.SIGTERM)
    code, text = finish(stopped)
    assert code == errors.SAVED_AFTER_SIGNAL, text
    saved = result(shop / "stopped")["steps"]
    assert 5 <= saved < 400
    assert result(shop / "stopped")["status"] == "saved_after_signal"

    code, text = finish(start(shop, "whole", *knobs))
    assert code == errors.DONE, text
    code, text = finish(start(shop, "stopped", *knobs))
    assert code == errors.DONE, text
    keep = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    whole, halves = records(shop / "whole", "train"), records(shop / "stopped", "train")
    assert [[r[key] for key in keep] for r in halves] == [[r[key] for key in keep] for r in whole]
    final = "final/adapter_model.safetensors"
    assert (shop / "stopped" / final).read_bytes() == (shop / "whole" / final).read_bytes()
    assert result(shop / "stopped")["sources"] == result(shop / "whole")["sources"]


def test_diverging_stops_with_the_step_and_the_rows(shop: Path) -> None:
    code, text = finish(start(shop, "diverging", "max_steps=30", "optim.lr=1e38", "optim.clip=0", "guard.patience=3"))
    assert code == errors.STOPPED_BY_GUARD, text
    assert "3 steps in a row" in text
    assert "rows:" in text
    assert "Traceback" not in text
    assert result(shop / "diverging")["status"] == "stopped_by_guard"
    assert not (shop / "diverging" / "final").exists()


def test_early_stopping_ships_the_best_weights(shop: Path) -> None:
    code, text = finish(
        start(
            shop,
            "early",
            "max_steps=40",
            "optim.lr=0.3",
            "schedule=constant",
            "eval.every=2",
            "early_stopping.patience=2",
        )
    )
    assert code == errors.DONE, text
    ended = result(shop / "early")
    assert ended["status"] == "early_stopped"
    assert ended["steps"] < 40
    losses = {record["step"]: record["loss"] for record in records(shop / "early", "eval") if record["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert ended["metrics"]["best_step"] == best
    assert ended["metrics"]["best"] == losses[best]
    assert best < ended["steps"], "else this test shows nothing"
    assert f"step-{best:06d}" in [path.name for path in (shop / "early" / "checkpoints").iterdir()]


@pytest.mark.parametrize(
    ("knob", "allowed"),
    [("seed=5", "seed"), ("batch.global_size=4", "batch.global_size")],
    ids=["seed", "global batch"],
)
def test_another_run_is_not_taken_for_a_resumed_one(shop: Path, knob: str, allowed: str) -> None:
    if not (shop / "small").exists():
        code, text = finish(start(shop, "small", "max_steps=2"))
        assert code == errors.DONE, text
    code, text = finish(start(shop, "small", "max_steps=3", knob))
    assert code == errors.USER_MISTAKE, text
    assert f"resume_allow=[{allowed}]" in text
    assert "Traceback" not in text


def test_a_disk_that_refuses_a_checkpoint_ends_the_run_with_its_cure(shop: Path) -> None:
    """Written behind training, so the step that asked for it has long gone on."""
    import resource

    if not (shop / "small").exists():  # the model and the tokens lie in the cache then: only checkpoints are larger
        code, text = finish(start(shop, "small", "max_steps=2"))
        assert code == errors.DONE, text
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        refused = start(shop, "refused", "max_steps=5000", "checkpoint.every=2", "eval.at_start=false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    code, text = finish(refused)
    assert code == errors.USER_MISTAKE, text
    assert "step 2 could not be written" in text
    assert "Free space" in text
    assert "Traceback" not in text
    ended = result(shop / "refused")
    assert (ended["status"], ended["final"]) == ("failed", None)
    assert ended["steps"] < 5000
