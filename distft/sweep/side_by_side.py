"""Jobs of a sweep that run at the same time on this machine, each with devices of its own.

Hydra's joblib launcher runs jobs side by side too, but all of them on all devices, and with Hydra's state pickled into
worker processes. A job here is the command that a person would type for it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from distft import errors
from distft.config.load import to_run
from distft.config.redact import redact
from distft.config.schema import Run
from distft.launch.jobs import in_sweep, job_words, note_job
from distft.launch.start import Command, verb_command
from distft.launch.stop import Signals
from distft.launch.watch import kill_groups, last_lines
from distft.parent import PARENT
from distft.sweep import lease

LOGS = "logs"  # in the sweep's folder: what each job prints
SHOWN_LINES = 12  # of a failed job's log


@dataclass
class Job:
    """One job: its overrides, the run that they make and where it lies."""

    number: int
    overrides: list[str]
    run: Run
    folder: Path
    told: str = ""  # the overrides that set it apart


def job_of(context: HydraContext, config: DictConfig, number: int, overrides: Sequence[str]) -> Job:
    """Compose one job of a sweep as Hydra's launchers do."""
    composed = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    folder = Path(str(composed.hydra.sweep.dir)).absolute() / str(composed.hydra.sweep.subdir)
    return Job(number, list(overrides), in_sweep(to_run(composed), folder), folder)


@dataclass
class Running:
    job: Job
    place: int  # among the leases
    process: subprocess.Popen[bytes]
    log: Path
    started: float


class SideBySide(Launcher):
    """`hydra/launcher=side_by_side`; `sweep.jobs` chooses it."""

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self.flags = list(flags)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        run = to_run(config)
        self.leases = lease.here(run.sweep.jobs, run.launch.ranks)
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()
        self.dry_run: bool = run.launch.dry_run

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """All jobs of a list. Returns how each ended, in the list's order."""
        waiting = [
            job_of(self.context, self.config, initial_job_idx + index, overrides)
            for index, overrides in enumerate(job_overrides)
        ]
        shared = set.intersection(*(set(job.overrides) for job in waiting)) if len(waiting) > 1 else set()
        for job in waiting:
            job.told = " ".join(word for word in job.overrides if word not in shared) if shared else ""
        order = [job.number for job in waiting]
        ends: dict[int, JobReturn] = {}

        def ended(job: Job, code: int) -> None:
            value = note_job(self.folder, job.number, job.overrides, run_dir_of(job), code)
            ends[job.number] = returned(job, value)

        self.carry_out(lambda: waiting.pop(0) if waiting else None, ended)
        return [ends[number] for number in order if number in ends]  # a dry run ends none

    def carry_out(self, take: Callable[[], Job | None], ended: Callable[[Job, int], None]) -> None:
        """Start a job in every free place, until `take` has no more and all have ended.

        A stop signal, or a job that was stopped by one, means the sweep: all jobs are told to save and end.

        Raises:
            SystemExit: the sweep was stopped.
        """
        (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
        running: list[Running] = []
        signals, sent, more = Signals(), 0, True
        with signals.caught(), ended_at_last(running):
            while running or more:
                more = more and not signals.received
                while more and len(running) < len(self.leases):
                    job = take()
                    more = job is not None
                    if job is not None:
                        self.begin(job, running, ended)
                for number in signals.received[sent:]:
                    sent += 1
                    for one in running:
                        one.process.send_signal(number)
                if signals.at_once:
                    kill_groups([one.process for one in running])
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    code = self.end(one, ended)
                    if code == errors.SAVED_AFTER_SIGNAL and not signals.received:
                        signals.received.append(errors.SAVED_AFTER_SIGNAL - 128)
                time.sleep(0.05)
        if signals.received:
            raise SystemExit(errors.ENDED_AT_ONCE if signals.at_once else errors.SAVED_AFTER_SIGNAL)

    def begin(self, job: Job, running: list[Running], ended: Callable[[Job, int], None]) -> None:
        """Start a job in the first free place."""
        place = next(place for place in range(len(self.leases)) if place not in [one.place for one in running])
        taken = self.leases[place]
        command = self.command(job).also(taken.environment)
        told = redact(job.told)
        if self.dry_run:
            cores = f"  (kept to {taken})" if taken.cores else ""
            print(f"# job {job.number}{told and ': '}{told}{cores}\n{command}", flush=True)
            return
        print(f"distft: job {job.number} on {taken}{told and ': '}{told}", flush=True)
        log = self.folder / LOGS / f"{job.number}.log"
        with log.open("ab") as output:
            process = start(command, output)
        if taken.cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, taken.cores)
        running.append(Running(job, place, process, log, time.monotonic()))

    def command(self, job: Job) -> Command:
        words = [word for word in job.overrides if word.lstrip("+").partition("=")[0].partition(".")[0] != "sweep"]
        return verb_command("train", *self.flags, *words, *job_words(job.run))

    def end(self, one: Running, ended: Callable[[Job, int], None]) -> int:
        code = one.process.returncode
        code = code if code >= 0 else errors.BUG
        seconds = time.monotonic() - one.started
        state = "done" if code == errors.DONE else f"exit code {code}"
        print(f"distft: job {one.job.number}: {state} ({seconds:.0f} s)", flush=True)
        if code not in (errors.DONE, errors.SAVED_AFTER_SIGNAL):
            print(f"The last lines of {one.log}:\n{last_lines(one.log, SHOWN_LINES)}", flush=True)
        ended(one.job, code)
        return code


def start(command: Command, output: IO[Any]) -> subprocess.Popen[bytes]:
    """Start a job's command, as the leader of a group of its own: a terminal's Ctrl-C reaches the sweep alone."""
    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.environment, PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


@contextlib.contextmanager
def ended_at_last(running: list[Running]) -> Any:
    """Whatever ends the sweep ends its jobs."""
    try:
        yield
    finally:
        kill_groups([one.process for one in running])
        for one in running:
            one.process.wait()


def run_dir_of(job: Job) -> Path:
    return Path(job.run.run.dir or job.folder)


def returned(job: Job, value: float | None) -> JobReturn:
    """What Hydra's sweepers take for the end of a job."""
    answer = JobReturn(overrides=job.overrides, working_dir=str(job.folder), task_name="distft")
    answer.status = JobStatus.COMPLETED
    answer.return_value = value
    return answer
