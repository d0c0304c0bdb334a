"""Trials: real runs of a few steps, each rank a process of its own, read back from what they leave."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.checkpoint import layout
from distft.config.load import write_snapshot
from distft.config.schema import Run
from distft.errors import DONE, NEGATIVE_VERDICT, USER_MISTAKE, UserMistake
from distft.launch.start import worker_commands
from distft.launch.watch import last_lines
from distft.parent import PARENT
from distft.prepared import Prepared

CRASH_SECONDS = 6.0  # what the other ranks of a trial get to end by themselves once one has failed


@dataclass(frozen=True)
class Trial:
    """A run to be made in `folder`."""

    folder: Path
    run: Run
    resume: Path | None = None  # a checkpoint to begin from

    @property
    def size(self) -> int:
        return int(self.run.launch.ranks)

    @property
    def split(self) -> str:
        """ranks x bins of a micro-batch x micro-batches of a step."""
        micro = self.run.batch.micro_size
        return f"{self.size}x{micro}x{math.ceil(self.run.batch.global_size / self.size / micro)}"

    def checkpoint(self, step: int) -> Path:
        return layout.step_folder(self.folder, step)

    def write(self, prepared: Prepared) -> None:
        """Make the folder as the controller leaves it to the ranks; `prepared`: what preflight found out."""
        (self.folder / "logs").mkdir(parents=True)
        write_snapshot(self.run, self.folder / "config.yaml")
        dataclasses.replace(prepared, model_folder=str(self.run.model.path)).write(self.folder)

    def start(self, threads: int) -> list[subprocess.Popen[bytes]]:
        """Start the ranks; all that they print goes into their logs."""
        resume = str(self.resume) if self.resume else None
        processes = []
        for rank, command in enumerate(worker_commands("direct", self.size, self.folder / "config.yaml", resume)):
            added = {**command.environment, "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
            with (self.folder / "logs" / f"rank-{rank}.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        command.argv,
                        env={**os.environ, **added},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                    )
                )
        return processes

    def records(self) -> list[dict[str, Any]]:
        """What the trial logged of its steps."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [record for line in lines if (record := json.loads(line))["split"] == "train"]

    def failure(self, codes: Sequence[int]) -> str:
        """Why the trial is of no use; empty where it came to its end (with a negative verdict on what it wrote, too).

        Raises:
            UserMistake: the run refused the configuration.
        """
        wrong = [(rank, code) for rank, code in enumerate(codes) if code not in (DONE, NEGATIVE_VERDICT)]
        if not wrong:
            return ""
        rank, code = next(((rank, code) for rank, code in wrong if code > 0), wrong[0])
        log = self.folder / "logs" / f"rank-{rank}.log"
        said = last_lines(log, 1).removeprefix("distft: ")
        if code == USER_MISTAKE:
            raise UserMistake(said)
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        return f"the trial {self.folder.name} ended with {how}: {said}"


def carry_out(trials: Sequence[Trial], prepared: Prepared, places: int) -> dict[str, str]:
    """Make all trials, as many at a time as there are `places` for ranks. Returns each one's failure by its name.

    Raises:
        UserMistake: see `Trial.failure`.
    """
    # The same number of threads in every trial: it decides the order of sums, and with it bits.
    threads = max(1, len(os.sched_getaffinity(0)) // max(places, *(trial.size for trial in trials)))
    if "OMP_NUM_THREADS" in os.environ:
        threads = int(os.environ["OMP_NUM_THREADS"])
    failures: dict[str, str] = {}
    waiting = list(trials)
    while waiting:
        together = [waiting.pop(0)]
        while waiting and sum(trial.size for trial in [*together, waiting[0]]) <= places:
            together.append(waiting.pop(0))
        failures |= side_by_side(together, prepared, threads)
    return failures


def side_by_side(trials: Sequence[Trial], prepared: Prepared, threads: int) -> dict[str, str]:
    started: dict[str, list[subprocess.Popen[bytes]]] = {}
    try:
        for trial in trials:
            trial.write(prepared)
            started[trial.folder.name] = trial.start(threads)
        for processes in started.values():
            wait(processes)
    finally:
        for processes in started.values():
            end(processes)
    return {
        trial.folder.name: trial.failure([process.returncode for process in started[trial.folder.name]])
        for trial in trials
    }


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or a few seconds after one has failed: whoever waits for a dead rank never comes back."""
    deadline = math.inf
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if deadline == math.inf and any(process.poll() for process in processes):
            deadline = time.monotonic() + CRASH_SECONDS
        time.sleep(0.05)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
