"""What a run tells while it goes: metrics.jsonl, the screen, W&B or TensorBoard. Rank 0 alone speaks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distft.log.background import Background
from distft.log.lines import Lines
from distft.log.screen import Screen

if TYPE_CHECKING:
    from distft.config.schema import Run
    from distft.world import World

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SKIPPED = "skipped.jsonl"


class Log:
    """The voice of a run. On other ranks than 0 every method does nothing, so that callers need not ask.

    `num_steps`: of the whole run. `resumed_step`: the step of the checkpoint that the run goes on from; records past it
    move to `*.abandoned.jsonl`, as do all of a run folder's records when it starts anew. `wandb_id`: the W&B run to
    continue, from that checkpoint; `self.wandb_id` is what the next checkpoint should remember (None without W&B).
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        world: World,
        num_steps: int,
        resumed_step: int | None = None,
        wandb_id: str | None = None,
    ) -> None:
        self.active = world.is_main
        self.wandb_id: str | None = None
        self.finished = False
        if not self.active:
            return
        self.screen = Screen(num_steps, resumed_step or 0)
        self.metrics = Lines(run_dir / METRICS, resumed_step, self.say)
        self.answers = Lines(run_dir / SAMPLES, resumed_step, self.say)
        # What was stepped over stays so from whichever step a run goes on; a run that starts anew has skipped nothing.
        self.skips = Lines(run_dir / SKIPPED, None if resumed_step is None else sys.maxsize)
        self.tracker: Background | None = None
        if run.log.tracker == "wandb":
            from distft.log.wandb import WandbTracker, new_id

            self.wandb_id = wandb_id or new_id()
            facts = {"world_size": world.size, "num_steps": num_steps}
            num_before = self.metrics.num_before + self.answers.num_before if wandb_id else None
            self.tracker = Background(
                WandbTracker(run, run_dir, facts, self.wandb_id, num_before, self.say), "W&B", self.say
            )
        elif run.log.tracker == "tensorboard":
            from distft.log.tensorboard import TensorBoardTracker

            self.tracker = Background(TensorBoardTracker(run_dir, resumed_step), "TensorBoard", self.say)

    def train(self, step: int, record: Mapping[str, Any]) -> None:
        """One training record: `step` counts finished optimizer steps."""
        if self.active:
            self.metrics.write({"step": step, "split": "train", **record})
            self.screen.train(step, record)
            if self.tracker:
                self.tracker.call("metrics", "train", step, dict(record))

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """One evaluation of the weights after `step` optimizer steps."""
        if self.active:
            self.metrics.write({"step": step, "split": "eval", **record})
            self.screen.evaluation(step, record)
            if self.tracker:
                self.tracker.call("metrics", "eval", step, dict(record))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sampled answers at an evaluation: rows with the same keys, such as prompt, answer and reference."""
        if self.active and rows:
            for row in rows:
                self.answers.write({"step": step, **row})
            if self.tracker:
                self.tracker.call("samples", step, [dict(row) for row in rows])

    def skipped(self, step: int, record: Mapping[str, Any]) -> None:
        """The global batch of a step is left out of the run from now on."""
        if self.active:
            self.skips.write({"step": step, **record})

    def go_back(self, step: int) -> None:
        """The run goes back to its checkpoint of `step`: later records move to `*.abandoned.jsonl`."""
        if self.active:
            self.metrics.go_back(step)
            self.answers.go_back(step)
            if self.tracker:
                self.tracker.call("go_back", step)

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if self.active:
            self.screen.say(text)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The end of the run: `done`, or why it ended; `summary`: best and last metrics. Later calls do nothing."""
        if self.active and not self.finished:
            self.finished = True
            self.screen.close()
            if self.tracker:
                self.tracker.close(status, dict(summary))
            self.metrics.close()
            self.answers.close()
            self.skips.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever ended the run without saying so has failed."""
        self.finish("failed", {})
