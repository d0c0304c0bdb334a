"""A run of two ranks whose rank 0 is killed and, started again, stands still: one run in Weights & Biases."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from tests.faults.runs import Shop, records
from tests.unit.wandb_offline import read

WORDS = [
    "launch.ranks=2", "strategy=ddp", "log.tracker=wandb", "log.tags=[watched]", "max_steps=100000",
    "data.eval_fraction=0.2", "eval.every=20", "checkpoint.every=20", "launch.max_restarts=1", "guard.stall_seconds=5",
]  # fmt: skip


def services() -> set[int]:
    """W&B's processes on this machine."""
    return {process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == "wandb-core"}


def test_a_run_that_is_killed_and_then_hangs_is_one_run_and_ends_with_an_alert(tmp_path: Path) -> None:
    shop, before = Shop.open(tmp_path), services()
    with shop.start("run", *WORDS, HOME=str(tmp_path), WANDB_MODE="offline") as started:
        started.wait_for_step(30)
        time.sleep(3)  # W&B writes every two seconds
        killed_at = records(started.folder)[-1]["step"]
        started.ranks()[0].kill()
        started.wait_for(lambda: (started.folder / "logs" / "restarts.jsonl").exists())
        started.wait_for_step(killed_at + 100)
        time.sleep(3)
        started.ranks()[1].suspend()
        code, text = started.end()
    assert code == 5, text

    crashed, stalled, told = (read(folder) for folder in sorted((started.folder / "wandb").glob("offline-run-*")))
    assert crashed.id == stalled.id == told.id != ""
    assert {crashed.name, stalled.name, told.name} == {"run"}
    assert crashed.tags == told.tags == ["watched"]
    assert crashed.config["launch"]["ranks"] == 2

    evaluations = {record["step"]: record["loss"] for record in records(started.folder, "eval")}
    best = stalled.summary["best_step"]
    assert stalled.summary["best"] == evaluations[best]
    assert stalled.summary["best"] <= min(evaluations[step] for step in evaluations if 0 < step <= best)
    assert crashed.summary["status"] == stalled.summary["status"] == "running", "both were killed"
    assert crashed.summary["last"]["loss"] == crashed.summary["last"]["loss"] > 0
    for run in (crashed, stalled):
        ranks = {key for row in run.history for key in row if key.startswith("system/")}
        assert {"system/rank-0/memory_bytes", "system/rank-1/memory_bytes", "system/rank-1/cpu_percent"} <= ranks
        assert run.step_metrics["train/*"] == run.step_metrics["system/*"] == "step"
    numbers = [row["_step"] for run in (crashed, stalled) for row in run.history]
    assert numbers == sorted(set(numbers)), "wandb sync drops what has a number twice"

    [(title, sentence, level)] = told.alerts
    assert (title, level) == ("Stalled: run", "ERROR")
    assert sentence.startswith("Rank 1 (process ")
    assert sentence in text
    assert told.summary["status"] == "stalled"
    assert told.exit_code == 1
    assert services() <= before, "nothing of W&B is left"
