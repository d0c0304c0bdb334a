"""A sweep's folder read back, whoever ran it and however far it came: its jobs, what sets them apart, their curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distft.config.given import SURROUNDINGS, all_knobs, within
from distft.errors import UserMistake
from distft.launch import lock
from distft.launch.jobs import JOBS, jobs_noted, read_result
from distft.log import METRICS

CONFIG = "config.yaml"
ENDED_WELL = ("done", "early_stopped")
Point = tuple[int, float]  # step, value


@dataclass
class Job:
    """One job: `values` of the knobs in which the sweep's jobs differ."""

    number: int
    folder: Path
    state: str  # done, early_stopped, pruned, failed, running, interrupted
    exit_code: int | None
    reason: str | None
    objective: float | None  # the best value of checkpoint.best
    best_step: int | None
    steps: int
    overrides: list[str]
    config: dict[str, Any]  # every knob by its dotted name; empty where it never came to be written
    train: list[Point] = field(default_factory=list)
    evaluation: list[Point] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether it ran to its end and has a value to be compared."""
        return self.state in ENDED_WELL and self.objective is not None


@dataclass
class SweepFolder:
    """All that a report tells of."""

    folder: Path
    jobs: list[Job]
    knobs: list[str]  # in which the jobs differ, seed last
    metric: str  # checkpoint.best
    smaller_is_better: bool

    @property
    def settings(self) -> list[str]:
        """The knobs without the seed: jobs that agree in them are repetitions."""
        return [name for name in self.knobs if name != "seed"]

    def ranked(self) -> list[Job]:
        """Jobs that count, the best first."""
        sign = 1 if self.smaller_is_better else -1
        return sorted((job for job in self.jobs if job.counts), key=lambda job: sign * (job.objective or 0.0))


def read(folder: Path) -> SweepFolder:
    """
    Raises:
        UserMistake: it is no folder of a sweep.
    """
    if not folder.is_dir():
        raise UserMistake(f"{folder} is no folder. Give the one of a sweep, such as multirun/2030-01-31_18-00-00.")
    notes = {int(note["job"]): note for note in jobs_noted(folder)}
    places = {int(path.parent.name): path.parent for path in folder.glob(f"*/{CONFIG}") if path.parent.name.isdigit()}
    for number, note in notes.items():
        places[number] = place_of(folder, number, str(note.get("folder", "")))
    if not places:
        kind = "is one run, not a sweep of several" if (folder / CONFIG).is_file() else "holds no job of a sweep"
        raise UserMistake(
            f"{folder} {kind}. Give the folder of `python train.py -m …`, which holds {JOBS} and a folder for each job."
        )
    jobs = [job_of(number, places[number], notes.get(number)) for number in sorted(places)]
    knobs = differing(jobs)
    for job in jobs:
        job.values = {name: value_in(job, name) for name in knobs}
    metric, mode = most_common(jobs, "checkpoint.best", "eval/loss"), most_common(jobs, "checkpoint.mode", "min")
    for job in jobs:
        read_curves(job, metric.removeprefix("eval/"))
    return SweepFolder(folder, jobs, knobs, metric, mode == "min")


def place_of(folder: Path, number: int, noted: str) -> Path:
    """A job's folder: where it was noted, or below a sweep's folder that was moved."""
    path = Path(noted)
    moved = [folder / path.name, folder / str(number)]
    return next((place for place in [path, *moved] if (place / CONFIG).is_file()), path)


def job_of(number: int, folder: Path, note: dict[str, Any] | None) -> Job:
    result = read_result(folder)
    metrics = result.get("metrics") or {}
    running = lock.read(folder / lock.LOCK)
    if running is not None and not running.is_gone:
        state, code = "running", None
    elif note is not None:
        code = int(note["exit_code"])
        state = str(note.get("status") or ("done" if code == 0 else "failed"))
    else:  # a sweep that was killed noted nothing of it
        status = result.get("status")
        code = 0 if status in (*ENDED_WELL, "pruned") else None
        state = str(status) if code == 0 else "interrupted"
    best = metrics.get("best")
    return Job(
        number=number,
        folder=folder,
        state=state,
        exit_code=code,
        reason=result.get("reason"),
        objective=float(best) if isinstance(best, int | float) and math.isfinite(best) else None,
        best_step=metrics.get("best_step"),
        steps=int(result.get("steps") or 0),
        overrides=[str(word) for word in (note or {}).get("overrides", [])],
        config=config_of(folder / CONFIG),
    )


def config_of(path: Path) -> dict[str, Any]:
    """A snapshot's knobs by their dotted names; empty where it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: found for name in all_knobs() if (found := inner(values, name.split("."))) is not None}


def inner(values: Any, path: Sequence[str]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def differing(jobs: Sequence[Job]) -> list[str]:
    """Knobs of what is computed that have several values, seed last.

    What only follows from a group's choice (optim=adamw,sgd changes optim.name and more) is left out.
    """
    known = [job for job in jobs if job.config]
    typed = {word.lstrip("+").partition("=")[0] for job in jobs for word in job.overrides}
    names = [name for name in all_knobs() if not within(name, SURROUNDINGS)]
    several = [name for name in names if len({told(job.config.get(name)) for job in known}) > 1]
    # Of a job that never started only its words are known.
    several += [name for name in typed if name in names and name not in several and len(words_for(jobs, name)) > 1]
    choices = [f"{name.partition('.')[0]}.{part}" for name in several for part in ("name", "method")]
    heads = [name for name in several if name in choices]

    def follows(name: str) -> bool:
        head = next((head for head in heads if head != name and head.partition(".")[0] == name.partition(".")[0]), None)
        pairs = {(told(job.config.get(head)), told(job.config.get(name))) for job in known} if head else set()
        return head is not None and name not in typed and len(pairs) == len({first for first, _ in pairs})

    return sorted((name for name in several if not follows(name)), key=lambda name: name == "seed")


def words_for(jobs: Sequence[Job], name: str) -> set[str]:
    words = (word.lstrip("+").partition("=") for job in jobs for word in job.overrides)
    return {value for key, _, value in words if key == name}


def value_in(job: Job, name: str) -> Any:
    """A knob's value: of the snapshot, or as the command line had it."""
    if job.config:
        return job.config.get(name)
    found = [word.partition("=")[2] for word in job.overrides if word.lstrip("+").partition("=")[0] == name]
    return yaml.safe_load(found[-1]) if found else None


def told(value: Any) -> str:
    """A value as a person reads it, and as values are compared."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict | bool):
        return json.dumps(value)
    return "" if value is None else str(value)


def most_common(jobs: Sequence[Job], name: str, default: str) -> str:
    values = [str(job.config[name]) for job in jobs if name in job.config]
    return max(set(values), key=values.count) if values else default


def read_curves(job: Job, key: str) -> None:
    """The training loss and the compared metric of every evaluation, by step."""
    for record in records(job.folder / METRICS):
        split, name = record.get("split"), "loss" if record.get("split") == "train" else key
        try:
            point = (int(record["step"]), float(record[name]))
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(point[1]):
            (job.train if split == "train" else job.evaluation).append(point)
            job.steps = max(job.steps, point[0])
    after = [value for step, value in job.evaluation if step > 0]
    if job.objective is None and after and job.state in ("running", "interrupted"):
        job.objective = min(after) if job.config.get("checkpoint.mode", "min") == "min" else max(after)


def records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # being written
            continue
        if isinstance(record, dict):
            yield record
