"""A real Slurm of two nodes: jobs submitted, asked to end, put back into the queue, equal to a run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft import errors
from tests.cluster.slurm import Slurm, running
from tests.faults.runs import PATIENCE, ROOT, Shop, final_weights, records, result
from tests.unit.wandb_offline import read

TWO_NODES = ("launch=slurm", "launch.nodes=2", "launch.ranks=2", "launch.time=00:10:00")
STEPS = 120


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("runs with a 'space'"))


def words(shop: Shop, name: str, *more: str) -> list[str]:
    """The command line of a small run; paths are quoted for Hydra's grammar."""
    pairs = [word.partition("=") for word in shop.words(name, "strategy=ddp")]
    quoted = [f'{knob}="{value}"' if value.startswith("/") else f"{knob}={value}" for knob, _, value in pairs]
    return [*quoted, *more]


def start(slurm: Slurm, *argv: str, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python train.py …` on the login node, or by what stands before it."""
    environment = {**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [*within, sys.executable, str(ROOT / "train.py"), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


def job_of(folder: Path) -> str:
    return str(json.loads((folder / "slurm.json").read_text())["job"])


def test_a_job_that_slurm_ends_goes_on_as_if_nothing_had_been(slurm: Slurm, shop: Shop) -> None:
    """sbatch, SIGUSR1 from Slurm to both nodes, requeue, the end: losses, weights and the W&B run of one run."""
    common = (f"max_steps={STEPS}", "schedule=constant")
    folder = shop.folder / "job"
    submitted = start(slurm, *words(shop, "job", *common, *TWO_NODES, "log=wandb"))
    assert submitted.returncode == errors.DONE, submitted.stderr
    job = job_of(folder)
    assert f"job {job} is in the queue: 2 ranks on 2 nodes" in submitted.stdout
    again = start(slurm, *words(shop, "job", *common, *TWO_NODES))
    assert (again.returncode, f"job {job} of this run is in the queue" in again.stderr) == (errors.USER_MISTAKE, True)

    slurm.wait_for(lambda: len(records(folder)) > 5, PATIENCE)
    slurm.ask("scancel", "--signal=USR1", job)  # as Slurm does before the time limit: to all ranks of all steps
    slurm.wait_for(lambda: slurm.job(job)["JobState"] == "PENDING", PATIENCE)
    stopped = result(folder)
    assert stopped["status"] == "saved_after_signal"
    assert 5 < stopped["steps"] < STEPS
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")  # else it rests for two minutes
    ended = slurm.wait_for_end(job, PATIENCE)
    log = (folder / "logs" / f"slurm-{job}.log").read_text()
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), log
    assert f"Going on after step {stopped['steps']} of {STEPS}" in log
    assert "Traceback" not in log
    assert "host: node1" in (folder / "environment.txt").read_text()

    whole = shop.folder / "whole"
    allocation = ("salloc", "--nodes=2", "--ntasks-per-node=1")
    done = start(slurm, *words(shop, "whole", *common, *TWO_NODES), within=allocation)
    assert done.returncode == errors.DONE, done.stderr
    told = [[(record["step"], record["loss"]) for record in records(run)] for run in (folder, whole)]
    assert told[0] == told[1]
    assert len(told[0]) == STEPS
    assert final_weights(folder) == final_weights(whole)

    sessions = [read(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
    assert len(sessions) == 2
    assert len({session.id for session in sessions}) == 1
    steps = [row["step"] for session in sessions for row in session.history if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_a_sweep_is_an_array_of_jobs(slurm: Slurm, shop: Shop) -> None:
    """Four jobs through submitit, two of which have no data: two W&B runs of one group, and two failures."""
    for name in "ab":
        (shop.folder / f"{name}.jsonl").write_bytes((shop.folder / "rows.jsonl").read_bytes())
    sweep = shop.folder / "sweep"
    paths = ",".join(f'"{shop.folder}/{name}.jsonl"' for name in ("a", "lost", "b", "gone"))
    fixed = [
        word for word in words(shop, "", "max_steps=2", "log=wandb") if not word.startswith(("run.dir", "data.path"))
    ]
    array = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=debug", "hydra.launcher.timeout_min=10"]
    done = start(slurm, "-m", *fixed, *array, f"data.path={paths}", f'hydra.sweep.dir="{sweep}"', "launch.ranks=1")
    assert done.returncode == errors.USER_MISTAKE, done.stdout + done.stderr
    assert "2 of 4 jobs of the sweep failed: job 1" in done.stderr
    assert "Traceback" not in done.stderr
    for number in (0, 2):
        assert result(sweep / str(number))["status"] == "done"
        assert "train.py -m" in (sweep / str(number) / "command.txt").read_text()
    sessions = [read(path) for path in sweep.glob("*/wandb/offline-run-*")]
    assert len({session.id for session in sessions}) == 2
    assert {session.group for session in sessions} == {"sweep"}
    assert slurm.left() == []


def test_half_an_allocation_is_not_taken_by_mistake(slurm: Slurm, shop: Shop) -> None:
    done = start(slurm, *words(shop, "half"), within=("salloc", "--nodes=2"))
    assert done.returncode == errors.USER_MISTAKE
    assert "This Slurm allocation has 2 nodes, and launch=local would use this one alone" in done.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["launch.partition=debig"], "launch.partition=debig: there is no such partition. Did you mean debug?"),
        (["launch.nodes=3", "launch.ranks=3"], "launch.nodes=3: partition debug has 2"),
        (
            ["launch.ranks=auto", "launch.gpus_per_node=3"],
            "launch.gpus_per_node=3: no node of partition debug has more",
        ),
        (["launch.time=02:00:00"], "launch.time=02:00:00: partition debug ends jobs after 01:00:00"),
        (["launch.cpus_per_rank=64"], "Slurm refuses the job: Requested node configuration is not available"),
        (["launch.sbatch=['--constraint=h100']"], "Slurm refuses the job: Invalid feature specification"),
    ],
)
def test_what_slurm_would_refuse_never_reaches_its_queue(more: list[str], told: str, slurm: Slurm, shop: Shop) -> None:
    assert slurm.left() == []
    done = start(slurm, *words(shop, "refused", *TWO_NODES, *more))
    assert done.returncode == errors.USER_MISTAKE
    assert done.stderr.startswith(f"distft: {told}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert slurm.queue() == []
