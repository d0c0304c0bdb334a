"""When a run has to be over, and whether there is time for another step before that."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from distft.config.schema import Run
from distft.config.times import moment_of
from distft.errors import UserMistake
from distft.launch.slurm import end_of_job

VARIABLE = "DISTFT_DEADLINE"  # the controller's answer, for its ranks: a restart does not start the clock again
SLOW_DISK = 1e8  # bytes a second that a checkpoint is thought to be written with, until one was
RECENT = 50  # steps whose times count
MARGIN_SECONDS = 5.0  # to close files and leave
SLOWER = 1.25  # than what was measured: the next step or save may be


@dataclass(frozen=True)
class Deadline:
    at: float  # seconds since 1970
    name: str  # as it is told
    by_slurm: bool

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def settle(run: Run, started: float, environment: Mapping[str, str] = os.environ) -> Deadline | None:
    """The deadline of a launch that began at `started`: what the controller found out, else `launch.deadline` or the
    end of the Slurm job, whichever comes first.

    Raises:
        UserMistake: it is over already.
    """
    if told := environment.get(VARIABLE):
        return Deadline(**json.loads(told)) if told != "none" else None
    wish = run.launch.deadline
    if wish == "none":
        return None
    found = []
    if wish != "auto":
        at = moment_of(wish, started)
        if at <= time.time():
            raise UserMistake(f"launch.deadline={wish} is over already. Give a later one, or drop it.")
        found.append(Deadline(at, f"launch.deadline={wish}", False))
    end = end_of_job(environment)
    if end is not None:
        found.append(Deadline(end, "the end of the Slurm job", True))
    return min(found, key=lambda deadline: deadline.at, default=None)


def seconds_needed(steps: Sequence[float], evaluation: float, saves: float) -> float:
    """Seconds from now on until a stop that is asked for after the next step would be complete.

    Args:
        steps: seconds of recent steps; the slowest counts, twice: all ranks agree one step after it was asked for.
        evaluation: seconds of the evaluation that these steps meet, 0 without one.
        saves: seconds of the checkpoint to be written, and of the one that is in the making.
    """
    return SLOWER * (2 * max(steps, default=0.0) + evaluation + saves) + MARGIN_SECONDS


@dataclass
class Clock:
    """Rank 0's time decides for all. `first_save`: seconds that a save is thought to take until one is measured."""

    deadline: Deadline | None = None
    first_save: float = 0.0
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    evaluation: float = 0.0  # seconds of the last one
    aside: float = 0.0  # seconds of evaluations since the last step
    before: float = field(default_factory=time.monotonic)
    num_steps: int = 0
    too_late: threading.Timer | None = None  # until the first step has ended

    @classmethod
    def of(cls, run: Run, is_main: bool, num_trained: float, run_dir: Path) -> Clock:
        """`num_trained`: parameters of which this rank saves the master and the moments."""
        from distft.launch.worker import end_by_mistake

        until = settle(run, psutil.Process().create_time()) if is_main else None
        values = 3 if run.optim.name == "adamw" else 1  # fp32 each
        clock = cls(until, first_save=4 * values * num_trained / SLOW_DISK)
        clock.expect_a_step(partial(end_by_mistake, run_dir))
        return clock

    def expect_a_step(self, otherwise: Callable[[str], None]) -> None:
        """Call `otherwise` with what is wrong, on a thread of its own, where Slurm is about to end the job and no step
        has ended since this start: such a job would come and go for ever, or be killed without a word."""
        if self.deadline is None or not self.deadline.by_slurm:
            return
        left = self.deadline.at - time.time()
        sentence = (
            f"The first step of this start has not ended in {left - MARGIN_SECONDS:.0f} s, and Slurm ends the job in "
            f"{MARGIN_SECONDS:g} s: its time limit is shorter than one step. Give it more (launch.time), or make a "
            "step shorter (more ranks, a smaller batch.global_size)."
        )
        self.too_late = threading.Timer(max(0.0, left - MARGIN_SECONDS), otherwise, [sentence])
        self.too_late.daemon = True
        self.too_late.start()

    def evaluated(self, seconds: float) -> None:
        self.evaluation = seconds
        self.aside += seconds

    def near(self, evaluates: bool, save: float | None, writing: bool) -> bool:
        """Called after each step: whether to stop now, since after another step it might be too late.

        Args:
            evaluates: one of the next two steps ends in an evaluation.
            save: seconds that the last checkpoint took to be complete, None before the first.
            writing: one is in the making.
        """
        if self.deadline is None:
            return False
        now = time.monotonic()
        self.num_steps += 1
        if self.too_late is not None:
            self.too_late.cancel()
        if self.num_steps == 2:
            self.steps.clear()  # the first step compiles and warms up
        self.steps.append(now - self.before - self.aside)
        self.before, self.aside = now, 0.0
        saves = (self.first_save if save is None else save) * (2 if writing else 1)
        return time.time() + seconds_needed(self.steps, self.evaluation if evaluates else 0.0, saves) > self.deadline.at

    def why(self, save: float | None) -> str:
        """What was measured, for the sentence at the end."""
        assert self.deadline is not None
        saved = f", a save {save:.1f} s" if save is not None else ""
        left = self.deadline.at - time.time()
        step = statistics.median(self.steps) if self.steps else 0.0
        return f"{self.deadline.name}, {left:.0f} s before it (a step takes {step:.2g} s{saved})"
