"""Weights & Biases as its viewer sees it: keys, axes, best and last, alerts, ranks; and a server that does harm."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from distft.config.check import check
from distft.config.load import write_snapshot
from distft.config.schema import Run
from distft.launch.start import package_path
from distft.log import last_word
from distft.log.system import Gathering, Sampler, named, sample_file, spread
from distft.log.tally import Tally
from distft.world import World
from tests.unit.test_log import FAKE_KEY, assert_no_secret, records, session
from tests.unit.wandb_offline import read
from tests.unit.wandb_server import serving

CURVE = {step: pytest.approx(1 / step) for step in range(1, 7)}


# best and last


def test_best_and_last_follow_the_evaluations(tmp_path: Path) -> None:
    tally = Tally("eval/loss", "min")
    tally.note(0, {"loss": 1.0})
    assert tally.values == {"first": {"loss": 1.0}, "last": {"loss": 1.0}}
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5)):
        tally.note(step, {"loss": loss})
    assert tally.values == {"first": {"loss": 1.0}, "best": 2.0, "best_step": 4, "last": {"loss": 2.5}}
    tally.note(8, {"loss": "NaN"})
    assert (tally.values["best"], tally.values["last"]) == (2.0, {"loss": "NaN"})

    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "split": "train", "loss": 0.1}, {"step": 2, "split": "eval", "loss": 3.0}]
    lines += [{"step": 4, "split": "eval", "loss": 4.0}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tally.read(metrics)
    assert tally.values == {"best": 3.0, "best_step": 2, "last": {"loss": 4.0}}
    most = Tally("eval/accuracy", "max")
    for step, accuracy in ((1, 0.2), (2, 0.4), (3, 0.3)):
        most.note(step, {"accuracy": accuracy})
    assert (most.values["best"], most.values["best_step"]) == (0.4, 2)


# ranks


def test_every_rank_publishes_how_it_fares_and_rank_0_reads_it(tmp_path: Path) -> None:
    import torch

    samplers = [Sampler(tmp_path, World(rank, 2, rank, rank, 2, torch.device("cpu"))) for rank in range(2)]
    gathering, deadline, found = Gathering(tmp_path, 2), time.monotonic() + 20, dict[str, float]()
    while len(found) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
        found |= gathering.fresh()
    for sampler in samplers:
        sampler.stop()
    names = ("cpu_percent", "memory_bytes", "host_cpu_percent", "host_memory_percent")
    assert set(found) == {f"system/rank-{rank}/{name}" for rank in range(2) for name in names}
    assert found["system/rank-1/memory_bytes"] > 10e6
    assert gathering.fresh() == {}, "what was read once is not sent again"
    sample_file(tmp_path, 0).write_text("{")
    assert Gathering(tmp_path, 2).fresh().keys() == {f"system/rank-1/{name}" for name in names}


def test_of_many_ranks_the_spread_is_shown() -> None:
    samples = {rank: {"cpu_percent": float(rank)} for rank in range(101)}
    assert spread(samples) == {
        "system/cpu_percent/min": 0.0,
        "system/cpu_percent/median": 50.0,
        "system/cpu_percent/max": 100.0,
    }
    assert named({3: {"gpu_watts": 1.0}}) == {"system/rank-3/gpu_watts": 1.0}


# what a viewer sees


def test_alerts_are_chosen_by_name() -> None:
    run = Run()
    run.log.alerts = ["stall", "spik"]
    assert [problem for problem in check(run) if "log.alerts" in problem] == [
        "log.alerts: spik is no alert. Did you mean spike? There are: stall, spike, end."
    ]


def test_a_run_in_the_records(tmp_path: Path) -> None:
    """Two sessions of one run folder, of which the first did not reach a checkpoint: one W&B run."""
    first = session(tmp_path, "wandb", CRASHES="3")
    second = session(tmp_path, "wandb")
    ids = [re.findall(r"id (\w{8})", printed)[0] for printed in (first, second)]
    assert ids[0] == ids[1]
    crashed, whole = (read(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*")))
    assert crashed.id == whole.id == ids[0]

    assert (crashed.exit_code, crashed.summary["status"]) == (None, "running"), "it was killed and said nothing"
    assert (crashed.summary["best"], crashed.summary["best_step"]) == (2.5, 3)
    assert crashed.summary["last"] == {"loss": 2.5, "source/docs/loss": 1.5}
    assert crashed.alerts == []

    assert (whole.exit_code, whole.summary["status"]) == (0, "done")
    assert (whole.summary["best"], whole.summary["best_step"]) == (2.0, 6)
    assert whole.summary["first"] == {"loss": 3.0, "source/docs/loss": 1.5}
    titles = [(title, level) for title, _, level in whole.alerts]
    assert titles == [("Spike of the loss", "WARN"), ("Ended: done", "INFO")]
    assert whole.alerts[1][1] == "done after step 6; best loss 2."
    assert whole.step_metrics["system/*"] == "step"
    ranks = [row for row in whole.history if "system/rank-0/memory_bytes" in row]
    assert ranks
    assert {row["system/rank-0/memory_bytes"] > 10e6 for row in ranks} == {True}
    numbers = [row["_step"] for run in (crashed, whole) for row in run.history]
    assert numbers == sorted(set(numbers)), "wandb sync drops what has a number twice"


def test_the_last_word_of_a_run_that_cannot_speak(tmp_path: Path) -> None:
    """A stall, and the end of a rank 0 that was killed: told by another process, once, and in the same W&B run."""
    printed = session(tmp_path, "wandb", CRASHES="3")
    run = Run()
    write_snapshot(run, tmp_path / "config.yaml")
    last_word.of_end(tmp_path, "failed", "rank 0 was ended by SIGKILL.", package_path())
    last_word.of_end(tmp_path, "failed", "nobody hears this", package_path())
    found = [read(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert [one.id for one in found] == 2 * re.findall(r"id (\w{8})", printed)
    assert found[1].alerts == [(f"Ended: {tmp_path.name}"[:63], "rank 0 was ended by SIGKILL.", "ERROR")]
    assert found[1].summary == {"status": "failed", "reason": "rank 0 was ended by SIGKILL."} | found[1].summary
    assert found[1].exit_code == 1
    last_word.of_end(tmp_path / "untracked", "failed", "no tracker", package_path())
    assert not (tmp_path / "untracked").exists()


def test_a_server_is_sent_all_of_it(tmp_path: Path) -> None:
    """Online, through W&B's own client: the history, the summary and the alerts arrive."""
    with serving() as server:
        printed = session(tmp_path, "wandb", WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=server.address)
        assert f"W&B: {server.address}/lab/distft/runs/" in printed
    assert {row["step"]: row["train/loss"] for row in server.history.values() if "train/loss" in row} == CURVE
    assert (server.summary["best"], server.summary["best_step"], server.summary["status"]) == (2.0, 6, "done")
    assert [alert["title"] for alert in server.alerts] == ["Spike of the loss", "Ended: done"]
    assert server.runs[0]["groupName"] == "a-sweep"
    assert server.runs[0]["tags"] == ["one", "two"]
    assert server.exit_code == 0
    assert_no_secret(tmp_path)


# a server that does harm


def unharmed(folder: Path, printed: str) -> None:
    """The run went through all of its steps without waiting, and nothing of it is lost."""
    assert [record["step"] for record in records(folder / "metrics.jsonl") if record["split"] == "train"] == [*CURVE]
    assert float(re.findall(r"slowest (\S+)", printed)[0]) < 1.5, "no call waits: that would take 2 s and more"
    assert_no_secret(folder)


def recorded_offline(folder: Path) -> dict[int, Any]:
    (found,) = (folder / "wandb").glob("offline-run-*")
    return {row["step"]: row["train/loss"] for row in read(found).history if "train/loss" in row}


def test_a_wrong_key(tmp_path: Path) -> None:
    with serving(refuses_keys=True) as server:
        printed = session(
            tmp_path, "wandb", WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=server.address, WANDB_INIT_TIMEOUT="4"
        )
    assert server.num_requests > 0
    assert "W&B could not be reached" in printed
    unharmed(tmp_path, printed)
    assert recorded_offline(tmp_path) == CURVE


def test_a_refused_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    printed = session(tmp_path, "wandb", WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=address, WANDB_INIT_TIMEOUT="3")
    assert "W&B could not be reached" in printed
    unharmed(tmp_path, printed)
    assert recorded_offline(tmp_path) == CURVE


def test_a_server_that_dies_in_the_middle(tmp_path: Path) -> None:
    """It accepts the run and then nothing: what it did not take lies on the disk, for `wandb sync`."""
    with serving(dies_after_start=True) as server:
        started = time.monotonic()
        printed = session(
            tmp_path, "wandb", WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=server.address, WANDB_FINISH_TIMEOUT="3"
        )
        took = time.monotonic() - started
    assert server.dead.is_set()
    assert server.history == {}
    unharmed(tmp_path, printed)
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert {row["step"]: row["train/loss"] for row in read(folder).history if "train/loss" in row} == CURVE
    assert took < 60, "the end of a run waits for its tracker, but not for long"
