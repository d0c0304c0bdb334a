"""The process that a person starts: it makes the run folder, has preflight done, starts the ranks, waits."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from distft import errors
from distft.config.check import check, settle, with_absolute_paths
from distft.config.schema import Run
from distft.config.schema.sweep import Sweep
from distft.config.slurm_rules import num_ranks as num_ranks_of_job
from distft.errors import Mistakes
from distft.launch import deadline, output, queue
from distft.launch.fleet import hosts_of
from distft.launch.folder import make_folder, place_run
from distft.launch.hostfile import at
from distft.launch.hosts import shown, write_hostfile
from distft.launch.jobs import in_sweep
from distft.launch.restart import Places, keep_running, newest_checkpoint
from distft.launch.ssh import Attempt, fleet_of
from distft.launch.stall import watching, watching_hosts
from distft.launch.start import package_path, verb_command, worker_commands
from distft.launch.stop import STOP_SIGNALS, Signals
from distft.launch.topology import count_gpus, num_ranks
from distft.launch.watch import Ending, run_direct, run_launcher
from distft.log import last_word
from distft.parent import PARENT
from distft.result import write_failure


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
    run = dataclasses.replace(run, sweep=Sweep()) if sweep_folder is None else in_sweep(run, sweep_folder)
    known, run = place_run(with_absolute_paths(run))
    if run.launch.target in ("local", "slurm") and not run.launch.dry_run:
        queue.refuse(run, known)
    hosts = hosts_of(run) if run.launch.target == "ssh" else []
    size = num_ranks(run.launch.ranks)
    run_dir = make_folder(run, command, known, os.environ.get("SLURM_JOB_ID"))
    in_children = run.launch.engine != "direct" or sweep_folder is not None or run.launch.max_restarts > 0
    alone = size == 1 and not in_children and run.launch.target == "local"
    snapshot = run_dir / "config.yaml"
    resume = run.resume if run.resume not in ("auto", "never") else None
    if run.launch.dry_run and run.launch.target != "local":
        if hosts:
            write_hostfile(run_dir, hosts)
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
        size, ends_at = num_ranks(run.launch.ranks), until.at if until else None
        ended = keep_running(
            run,
            run_dir,
            {host: size},
            resume,
            attempt,
            signals,
            ends_at,
            lambda: {host: size - max(0, gpus - count_gpus())},
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
        last_word.of_end(run_dir, UNTOLD[ended.code], ended.sentence, package_path())
    return ended.code


# Ends that no rank can tell for sure, with their status in result.json.
UNTOLD = {errors.BUG: "failed", errors.STALLED: "stalled", errors.ENDED_AT_ONCE: "ended_at_once"}


def start_slurm(run: Run, run_dir: Path, resume: str | None) -> int:
    """A job for Slurm: all that can be found wrong is found here, before it waits in the queue for its nodes. Inside of
    an allocation its script runs at once."""
    signals = Signals()
    script = queue.write_script(run, run_dir, resume)
    start = "" if queue.in_job(os.environ) else queue.try_out(script)
    with signals.caught():
        size = {"WORLD_SIZE": str(num_ranks_of_job(run.launch))}
        code = preflight_in_child(run_dir / "config.yaml", signals, size)
        if code or signals.received:
            return code or errors.SAVED_AFTER_SIGNAL
        if queue.in_job(os.environ):
            return queue.run_here(run_dir, script, signals)
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
