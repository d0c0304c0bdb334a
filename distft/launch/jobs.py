"""The jobs of a sweep: what is noted of each when it ends, what stands in a job's command line, the verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft import errors
from distft.config.load import Composed, compose
from distft.config.redact import redact
from distft.config.schema import Run
from distft.config.schema.sweep import Sweep
from distft.launch.start import quoted
from distft.result import RESULT

JOBS = "jobs.jsonl"  # in a sweep's folder: a line for each job that ended; of a job that ended twice, the last counts
INTERRUPTED = (errors.SAVED_AFTER_SIGNAL, errors.ENDED_AT_ONCE)


def compose_sweep(argv: Sequence[str]) -> Composed:
    """Compose a command line; of a sweep, the knobs of `sweep.space` join it as if they were typed.

    Raises:
        UserMistake, Mistakes: as `compose`.
    """
    composed = compose(argv)
    if composed.run is None or not composed.line.sweep or not composed.run.sweep.space:
        return composed
    typed = {override.key_or_group for override in composed.line.parsed}
    words = [f"{name}={listed(value)}" for name, value in composed.run.sweep.space.items() if name not in typed]
    return compose([*argv, *words])


def listed(value: Any) -> str:
    """A value of `sweep.space` as it stands on a command line: text is Hydra's grammar already."""
    if isinstance(value, list):
        return ",".join(listed(item) for item in value)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_sweep(run: Run, job_folder: Path) -> Run:
    """A job of a sweep: its folder is the run's, and the tracker groups it with the others."""
    group = run.log.group
    if group is None and run.log.tracker == "wandb":
        group = job_folder.parent.name
    where = run.run.dir or (str(job_folder) if run.resume in ("auto", "never") else None)
    return dataclasses.replace(
        run,
        log=dataclasses.replace(run.log, group=group),
        run=dataclasses.replace(run.run, dir=where),
        sweep=Sweep(),
    )


def job_words(run: Run) -> list[str]:
    """What a job in a process of its own is told beside its overrides. `run`: from `in_sweep`."""
    words = [f"run.dir={quoted(str(run.run.dir))}"]
    if run.log.group and run.log.tracker == "wandb":
        words.append(f"log.group={quoted(run.log.group)}")
    return words


def note_job(sweep_dir: Path, job: int, overrides: Sequence[str], run_dir: Path, code: int) -> float | None:
    """Write down how a job of a sweep ended. Returns the sweeper's objective, None where there is none."""
    result = read_result(run_dir) if code == errors.DONE else {}
    value = objective(result)
    status = result.get("status", "done") if code == errors.DONE else "interrupted" if code in INTERRUPTED else "failed"
    told = [redact(word) for word in overrides]
    record = {"job": job, "overrides": told, "folder": str(run_dir), "exit_code": code, "status": status}
    path = sweep_dir / JOBS
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a kill
    with path.open("a", encoding="utf-8") as lines:
        lines.write(("\n" if torn else "") + json.dumps({**record, "objective": value}) + "\n")
    return value


def read_result(run_dir: Path) -> dict[str, Any]:
    """The `result.json` of a run; empty where there is none that can be read."""
    try:
        found = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def objective(result: dict[str, Any]) -> float | None:
    """The best value of `checkpoint.best` that a `result.json` tells."""
    value = (result.get("metrics") or {}).get("best")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def jobs_noted(sweep_dir: Path) -> list[dict[str, Any]]:
    """The last record of each job that ended, by its number."""
    path = sweep_dir / JOBS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = {}
    for line in lines:
        try:
            record = json.loads(line)
            records[int(record["job"])] = record
        except (ValueError, TypeError, KeyError):  # torn by a kill
            continue
    return [records[job] for job in sorted(records)]


def sweep_verdict(sweep_dir: Path) -> int:
    """Tell how the jobs of a sweep ended. A failed one makes the exit code: its own, or 1 where they differ."""
    jobs = jobs_noted(sweep_dir)
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        job["overrides"] = [word for word in job["overrides"] if word not in shared]
        value = "" if job["objective"] is None else f"  {job['objective']:.6g}"
        status = job.get("status", "done").replace("_", " ")
        state = status if job["exit_code"] == 0 else f"exit code {job['exit_code']}"
        print(f"{job['folder']}  {' '.join(job['overrides'])}  {state}{value}")
    if len(jobs) > 1:
        print(f"Compare them: distft report {shlex.quote(str(sweep_dir))}")
    failed = [job for job in jobs if job["exit_code"]]
    if not failed:
        return errors.DONE
    named = "; ".join(f"job {job['job']} ({' '.join(job['overrides'])}): {job['exit_code']}" for job in failed)
    sys.stdout.flush()
    sys.stderr.write(f"distft: {len(failed)} of {len(jobs)} jobs of the sweep failed: {named}\n")
    codes = {job["exit_code"] for job in failed}
    return codes.pop() if len(codes) == 1 else errors.BUG
