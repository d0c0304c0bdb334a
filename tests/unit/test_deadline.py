"""When a run has to be over, whether there is time for another step, and what Slurm is asked."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distft.config.load import compose
from distft.config.times import moment_of
from distft.errors import DeadlineStop, SignalStop, UserMistake
from distft.launch import slurm
from distft.launch.deadline import MARGIN_SECONDS, SLOWER, VARIABLE, Clock, Deadline, seconds_needed, settle
from distft.launch.folder import requeued_folder


def test_moments_as_people_write_them() -> None:
    assert moment_of(90, 1000.0) == 1090
    assert moment_of("90", 1000.0) == 1090
    assert moment_of("01:02:03", 1000.0) == 1000 + 3723
    assert moment_of("2-00:00:10", 1000.0) == 1000 + 2 * 86400 + 10
    assert moment_of("2026-01-31T18:00:00+00:00", 1000.0) == 1769882400
    assert moment_of("2026-01-31T18:00", 0.0) == datetime.datetime(2026, 1, 31, 18).timestamp()
    for wrong in ("01:30", "soon", True, "1h", ""):
        with pytest.raises(ValueError):
            moment_of(wrong, 0.0)


def test_the_earlier_of_the_knob_and_slurm() -> None:
    run, now = compose(["launch.deadline=100"]).run, time.time()
    assert settle(run, now, {}) == Deadline(now + 100, "launch.deadline=100", False)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(now) + 50)}
    assert settle(run, now, job) == Deadline(int(now) + 50, "the end of the Slurm job", True)
    job["SLURM_JOB_END_TIME"] = str(int(now) + 500)
    assert settle(run, now, job) == Deadline(now + 100, "launch.deadline=100", False)
    assert settle(compose(["launch.deadline=none"]).run, now, job) is None
    assert settle(compose([]).run, now, {}) is None
    told = Deadline(now - 5, "launch.deadline=100", False)
    assert settle(run, now, {VARIABLE: told.text()}) == told, "a controller's word is not asked again"
    assert settle(run, now, {VARIABLE: "none"}) is None
    with pytest.raises(UserMistake, match="is over already"):
        settle(compose(["launch.deadline=2020-01-01T00:00"]).run, now, {})


def test_time_is_kept_for_two_steps_an_evaluation_and_the_saves() -> None:
    assert seconds_needed([], 0.0, 0.0) == MARGIN_SECONDS
    assert seconds_needed([1.0, 3.0, 2.0], 0.0, 10.0) == SLOWER * (6 + 10) + MARGIN_SECONDS
    assert seconds_needed([1.0], 60.0, 10.0) == SLOWER * (2 + 60 + 10) + MARGIN_SECONDS


def clock(left: float, step: float, first_save: float = 0.0) -> Clock:
    """A clock whose recent steps took `step` seconds each, `left` seconds before its deadline."""
    found = Clock(Deadline(time.time() + left, "launch.deadline=1", False), first_save)
    found.steps.extend([step] * 5)
    found.num_steps = 5
    return found


def test_a_clock_says_when_to_stop() -> None:
    assert not clock(30, step=2).near(evaluates=False, save=10, writing=False)  # needs 1.25 * 14 + 5 = 22.5
    assert clock(30, step=5).near(evaluates=False, save=10, writing=False)  # 30
    assert clock(30, step=2).near(evaluates=False, save=17, writing=False)  # 31.25
    assert clock(30, step=2).near(evaluates=False, save=10, writing=True)  # 35: one is in the making
    assert clock(30, step=2, first_save=17).near(evaluates=False, save=None, writing=False)
    long = clock(30, step=2)
    long.evaluated(20)
    assert long.near(evaluates=True, save=10, writing=False)
    assert not long.near(evaluates=False, save=10, writing=False), "only where one is due"
    assert not Clock(None, 1e9).near(evaluates=True, save=1e9, writing=True), "no deadline, or not rank 0"


def test_the_time_of_an_evaluation_is_no_step_time() -> None:
    found = clock(1000, step=0.0)
    found.before = time.monotonic() - 21
    found.evaluated(20)
    found.near(evaluates=False, save=0, writing=False)
    assert 0.9 < max(found.steps) < 2


SLOW = """
import sys, time
from distft.launch.deadline import Clock, Deadline
clock = Clock(Deadline(time.time() + 6, "the end of the Slurm job", True))
clock.expect_a_step(lambda sentence: print(sentence, flush=True))
if sys.argv[1] == "quick":
    clock.near(evaluates=False, save=0, writing=False)
time.sleep(2)
"""


def test_a_job_that_ends_before_its_first_step_is_told() -> None:
    told = [
        subprocess.run([sys.executable, "-c", SLOW, speed], capture_output=True, text=True, check=True).stdout
        for speed in ("slow", "quick")
    ]
    assert "The first step of this start has not ended in 1 s, and Slurm ends the job in 5 s" in told[0]
    assert "shorter than one step" in told[0]
    assert told[1] == ""


def program(folder: Path, name: str, text: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def test_the_end_of_a_job_is_asked_of_squeue_where_the_environment_lacks_it(tmp_path: Path) -> None:
    asked = program(tmp_path, "squeue", f'echo "$@" > {tmp_path}/asked; echo 2026-01-31T18:00:00')
    assert slurm.end_of_job(asked) == datetime.datetime(2026, 1, 31, 18).timestamp()
    assert (tmp_path / "asked").read_text().split() == ["--noheader", "--jobs", "7", "--format=%e"]
    for answer in ("echo N/A", "exit 1", "true"):
        assert slurm.end_of_job(program(tmp_path, "squeue", answer)) is None
    assert slurm.end_of_job({"PATH": asked["PATH"]}) is None, "no job"
    assert slurm.end_of_job({"PATH": str(tmp_path / "nowhere"), "SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize(
    ("wish", "stop", "requeued"),
    [
        ("auto", SignalStop("USR1", by_slurm=True), True),
        ("auto", SignalStop("TERM"), False),
        ("auto", DeadlineStop("end of the job", by_slurm=True), True),
        ("auto", DeadlineStop("launch.deadline"), False),
        (True, SignalStop("TERM"), True),
        (False, SignalStop("USR1", by_slurm=True), False),
    ],
)
def test_who_goes_back_into_the_queue(wish: str | bool, stop: SignalStop, requeued: bool, tmp_path: Path) -> None:
    environment = program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/asked')
    said = slurm.requeue(wish, stop, environment)
    assert ("back in the queue" in said) == requeued == (tmp_path / "asked").exists()
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
        refused = program(tmp_path, "scontrol", "echo 'Job can not be requeued' >&2; exit 1")
        assert "was not requeued: Job can not be requeued" in slurm.requeue(wish, stop, refused)
        assert slurm.requeue(wish, stop, {"PATH": environment["PATH"]}) == "", "no job"


def test_a_requeued_job_goes_on_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = compose(["run.name=x"]).run
    for name in ("x-20260101-000000-7", "x-20260102-000000-7", "x-20260103-000000-8", "y-20260104-000000-7"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert requeued_folder(run) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert requeued_folder(run) is None, "its first start"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert requeued_folder(run) == tmp_path / "runs" / "x-20260102-000000-7"
