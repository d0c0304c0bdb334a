"""The process that a person starts: it makes the run folder, has preflight done, starts the ranks, waits."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distft import errors
from distft.config.check import check, settle, with_absolute_paths
from distft.config.redact import redact
from distft.config.schema import Run
from distft.config.slurm_rules import num_ranks as num_ranks_of_job
from distft.errors import Mistakes
from distft.launch import deadline, output, queue
from distft.launch.fleet import hosts_of
from distft.launch.folder import make_folder, place_run
from distft.launch.hostfile import at
from distft.launch.hosts import shown
from distft.launch.restart import Places, keep_running, newest_checkpoint
from distft.launch.ssh import Attempt, fleet_of
from distft.launch.stall import watching, watching_hosts
from distft.launch.start import verb_command, worker_commands
from distft.launch.stop import STOP_SIGNALS, Signals
from distft.launch.topology import count_gpus, num_ranks
from distft.launch.watch import Ending, run_direct, run_launcher
from distft.parent import PARENT
from distft.result import write_failure

JOBS = "jobs.jsonl"  # in a sweep's folder: a line for each job that ended


def start_run(
    run: Run,
    command: Sequence[str],
    in_process: Callable[[Run, Path], int],
    sweep_folder: Path | None = None,
) -> int:
    """One run from its checked configuration to its exit code.

    `in_process`: preflight and training in this process, taken where one rank is all there is; a sweep's jobs and what
    may be started again have processes of their own. `sweep_folder`: the folder that a sweep gives this job.

    Raises:
        Stop: before anything was started, or from `in_process`.
    """
    problems = check(run)
    if problems:
        raise Mistakes(problems)
    deadline.settle(run, time.time(), {})  # refuses one that is over
    if sweep_folder is not None:
        run = in_sweep(run, sweep_folder)
    known, run = place_run(with_absolute_paths(run))
    if run.launch.target == "slurm" and not run.launch.dry_run:
        queue.refuse(run, known)
    hosts = hosts_of(run) if run.launch.target == "ssh" else []
    size = num_ranks(run.launch.ranks)
    run_dir = make_folder(run, command, known, os.environ.get("SLURM_JOB_ID"))
    in_children = run.launch.engine != "direct" or sweep_folder is not None or run.launch.max_restarts > 0
    alone = size == 1 and not in_children and run.launch.target == "local"
    snapshot = run_dir / "config.yaml"
    resume = run.resume if run.resume not in ("auto", "never") else None
    if run.launch.dry_run and run.launch.target != "local":
        print(shown(run, run_dir, hosts, resume) if hosts else queue.shown(run, run_dir, resume))
        return errors.DONE
    if run.launch.dry_run:
        commands = [verb_command("preflight", str(snapshot))]
        commands += worker_commands(run.launch.engine, size, snapshot, resume)
        # A line break would end the comment, and what follows it be a command.
        name = "".join(letter if letter.isprintable() else "?" for letter in str(run_dir))
        print("\n".join([f"# {name} holds the configuration. What would be started:", *map(str, commands)]))
        return errors.DONE
    if alone:
        output.keep(run_dir, 0)
        return in_process(settle(run), run_dir)
    return TARGETS[run.launch.target](run, run_dir, resume)


def start_local(run: Run, run_dir: Path, resume: str | None) -> int:
    """All ranks on this machine, started again as often as `launch.max_restarts` says."""
    signals = Signals()
    snapshot = run_dir / "config.yaml"
    until = deadline.settle(run, time.time())
    told = {deadline.VARIABLE: until.text() if until else "none"}

    host, gpus = socket.gethostname(), count_gpus()

    def attempt(places: Places, resume: str | None) -> Ending:
        size = places[host]
        commands = worker_commands(run.launch.engine, size, snapshot, resume)
        with watching(run, run_dir, size) as (look, environment):
            commands = [command.also(told | environment) for command in commands]
            if run.launch.engine == "direct":
                return run_direct(commands, run_dir, signals, look)
            with tempfile.TemporaryDirectory(prefix="distft-") as status:
                return run_launcher(commands[0], run_dir, signals, Path(status), look)

    with signals.caught():
        code = preflight_in_child(snapshot, signals)
        if code or signals.received:
            return code or errors.SAVED_AFTER_SIGNAL
        size, at = num_ranks(run.launch.ranks), until.at if until else None
        ended = keep_running(
            run, run_dir, {host: size}, resume, attempt, signals, at, lambda: {host: size - max(0, gpus - count_gpus())}
        )
    return told_of(ended, run_dir)


def start_ssh(run: Run, run_dir: Path, resume: str | None) -> int:
    """All ranks on the hosts of `launch.hostfile`, which are looked at before preflight and before any of them."""
    signals = Signals()
    until = deadline.settle(run, time.time())
    told = {deadline.VARIABLE: until.text() if until else "none"}
    with fleet_of(run, run_dir) as fleet:
        places = {host.name: len(host.slots) for host in fleet.hosts}

        def attempt(places: Places, resume: str | None) -> Ending:
            hosts = at(fleet.hosts, places)
            look = watching_hosts(run, run_dir, sum(places.values()))
            return Attempt(fleet, hosts, signals, look).carry_out(resume, told)

        with signals.caught():
            code = preflight_in_child(run_dir / "config.yaml", signals, {"WORLD_SIZE": str(sum(places.values()))})
            if code or signals.received:
                return code or errors.SAVED_AFTER_SIGNAL
            fleet.refuse_blind()
            at_latest = until.at if until else None
            ended = keep_running(run, run_dir, places, resume, attempt, signals, at_latest, fleet.available)
    return told_of(ended, run_dir)


def told_of(ended: Ending, run_dir: Path) -> int:
    """The exit code of a run, whose end is in result.json also where no rank could write it."""
    if ended.code in UNTOLD:
        write_failure(run_dir, UNTOLD[ended.code], ended.sentence, newest_checkpoint(run_dir))
    return ended.code


# Ends that no rank can tell for sure, with their status in result.json.
UNTOLD = {errors.BUG: "failed", errors.STALLED: "stalled", errors.ENDED_AT_ONCE: "ended_at_once"}


def start_slurm(run: Run, run_dir: Path, resume: str | None) -> int:
    """A job for Slurm: all that can be found wrong is found here, before it waits in the queue for its nodes."""
    signals = Signals()
    script = queue.write_script(run, run_dir, resume)
    start = queue.try_out(script)
    with signals.caught():
        size = {"WORLD_SIZE": str(num_ranks_of_job(run.launch))}
        code = preflight_in_child(run_dir / "config.yaml", signals, size)
    if code or signals.received:
        return code or errors.SAVED_AFTER_SIGNAL
    return queue.submit(run, run_dir, script, start)


TARGETS = {"local": start_local, "ssh": start_ssh, "slurm": start_slurm}  # by launch.target


def preflight_in_child(snapshot: Path, signals: Signals, told: Mapping[str, str] = MappingProxyType({})) -> int:
    """`distft preflight` in a process that ends before any rank starts, and with it all that it imported.

    `told`: environment variables, such as the number of ranks where the snapshot does not say it.
    """
    command = verb_command("preflight", str(snapshot))
    environment = {**os.environ, **command.environment, **told, PARENT: str(os.getpid())}
    process = subprocess.Popen(command.argv, env=environment, process_group=0)
    sent = 0
    while process.poll() is None:
        if len(signals.received) > sent:
            process.send_signal(signals.received[sent])
            sent += 1
        if signals.at_once:
            process.kill()
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    if signals.at_once:
        return errors.ENDED_AT_ONCE
    if -process.returncode in STOP_SIGNALS:
        return errors.SAVED_AFTER_SIGNAL
    return process.returncode if process.returncode >= 0 else errors.BUG


def in_sweep(run: Run, job_folder: Path) -> Run:
    """A job of a sweep: its folder is the run's, and the tracker groups it with the others."""
    group = run.log.group
    if group is None and run.log.tracker == "wandb":
        group = job_folder.parent.name
    where = run.run.dir or (str(job_folder) if run.resume in ("auto", "never") else None)
    return dataclasses.replace(
        run, log=dataclasses.replace(run.log, group=group), run=dataclasses.replace(run.run, dir=where)
    )


def note_job(sweep_dir: Path, job: int, overrides: Sequence[str], run_dir: Path, code: int) -> float | None:
    """Write down how a job of a sweep ended. Returns the sweeper's objective, None where there is none."""
    value = objective(run_dir) if code == errors.DONE else None
    told = [redact(word) for word in overrides]
    record = {"job": job, "overrides": told, "folder": str(run_dir), "exit_code": code, "objective": value}
    with (sweep_dir / JOBS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
    return value


def objective(run_dir: Path) -> float | None:
    """The best value of `checkpoint.best` that `result.json` tells."""
    path = run_dir / "result.json"
    if not path.is_file():
        return None
    value: Any = json.loads(path.read_text(encoding="utf-8")).get("metrics", {}).get("best")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def sweep_verdict(sweep_dir: Path) -> int:
    """Tell how the jobs of a sweep ended. A failed one makes the exit code: its own, or 1 where they differ."""
    path = sweep_dir / JOBS
    jobs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    jobs.sort(key=lambda job: job["job"])
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        job["overrides"] = [word for word in job["overrides"] if word not in shared]
        value = "" if job["objective"] is None else f"  {job['objective']:.6g}"
        state = "done" if job["exit_code"] == 0 else f"exit code {job['exit_code']}"
        print(f"{job['folder']}  {' '.join(job['overrides'])}  {state}{value}")
    failed = [job for job in jobs if job["exit_code"]]
    if not failed:
        return errors.DONE
    named = "; ".join(f"job {job['job']} ({' '.join(job['overrides'])}): {job['exit_code']}" for job in failed)
    sys.stderr.write(f"distft: {len(failed)} of {len(jobs)} jobs of the sweep failed: {named}\n")
    codes = {job["exit_code"] for job in failed}
    return codes.pop() if len(codes) == 1 else errors.BUG
