"""The jobs of a sweep under submitit: what is refused before they are submitted, and those that end without a word."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from distft.config.load import compose
from distft.launch import array, slurm
from tests.unit.test_deadline import program

SWEEP = ["-m", "optim.lr=1,2", "hydra/launcher=submitit_slurm"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-m", "optim.lr=1,2", "launch=slurm", "launch.ranks=1"], "hydra/launcher=submitit_slurm"),
        ([*SWEEP, "hydra.launcher.nodes=2"], "a job is one process"),
        ([*SWEEP, "hydra.launcher.partition=gpus"], r"hydra\.launcher\.partition=gpus: .* Did you mean gpu"),
        ([*SWEEP, "hydra.launcher.gpus_per_node=9"], r"hydra\.launcher\.gpus_per_node=9: no node of partition gpu"),
        ([*SWEEP, "hydra.launcher.timeout_min=121"], r"hydra\.launcher\.timeout_min, .*=02:01:00: .* after 02:00:00"),
    ],
)
def test_what_no_array_can_be(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        program(tmp_path, name, "exit 1")
    monkeypatch.setenv("PATH", program(tmp_path, "sinfo", "echo 'gpu*|2:00:00|3|gpu:8'")["PATH"])
    assert re.search(told, "\n".join(array.problems(compose(words))))
    assert array.problems(compose(SWEEP)) == []
    assert array.problems(compose(["-m", "optim.lr=1,2"])) == []


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "no sbatch on PATH" in array.problems(compose(SWEEP))[0]


def test_states_of_the_queue() -> None:
    assert slurm.read_states("12|N/A|RUNNING\n13|0|COMPLETING\n13|11|CANCELLED\n14|N/A|REQUEUE_HOLD\n") == {
        "12": "RUNNING",
        "13_0": "PENDING",
        "13_11": "CANCELLED",
        "14": "PENDING",
    }


def test_a_job_that_ended_without_a_word_is_noted_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("7_10", "7_2", "9"):
        (tmp_path / ".submitit" / job).mkdir(parents=True)
        (tmp_path / ".submitit" / job / f"{job}_submitted.pkl").touch()
    assert array.submitted(tmp_path) == ["7_2", "7_10", "9"], "as they are numbered"
    answer = "printf '7|2|COMPLETED\\n7|10|RUNNING\\n'"
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "squeue", answer)["PATH"])
    assert array.unfinished(tmp_path) == {"7"}
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"job": 0}) + "\n" + json.dumps({"job": 2}) + "\n")
    array.note_lost(compose([*SWEEP, f"hydra.sweep.dir={tmp_path}"]))
    record = json.loads((tmp_path / "jobs.jsonl").read_text().splitlines()[-1])
    assert (record["job"], record["overrides"], record["exit_code"]) == (1, ["optim.lr=2"], 1)
    assert "job 1 (7_10) ended without a word" in capsys.readouterr().err


def test_the_environment_of_jobs_is_theirs_alone(tmp_path: Path) -> None:
    before = dict(os.environ)
    with array.handed_over(compose([*SWEEP, f"hydra.sweep.dir={tmp_path}"]), ["python", "train.py", "a b"]):
        assert os.environ["SUBMITIT_PREEMPT_SIGNAL"] == "USR1"
        assert shlex.split(os.environ[array.COMMAND]) == ["python", "train.py", "a b"]
    assert dict(os.environ) == before
