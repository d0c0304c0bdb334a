"""What a run tells while it goes: metrics.jsonl, the screen, W&B or TensorBoard. Rank 0 alone speaks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distft.config.redact import redact
from distft.log.background import Background
from distft.log.lines import Lines
from distft.log.screen import Screen
from distft.log.tally import Tally

if TYPE_CHECKING:
    from distft.config.schema import Run
    from distft.log.system import Sampler
    from distft.world import World

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SKIPPED = "skipped.jsonl"
WELL = ("done", "early_stopped", "pruned")  # ends that nobody has to look at


class Log:
    """The voice of a run. On other ranks than 0 every method does nothing, so that callers need not ask; for W&B every
    rank publishes how its process and its device fare.

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
        self.sampler: Sampler | None = None
        if run.log.tracker == "wandb":
            from distft.log.system import Gathering, Sampler

            self.sampler = Sampler(run_dir, world)
        if not self.active:
            return
        self.screen = Screen(num_steps, resumed_step or 0)
        self.metrics = Lines(run_dir / METRICS, resumed_step, self.say)
        self.answers = Lines(run_dir / SAMPLES, resumed_step, self.say)
        # What was stepped over stays so from whichever step a run goes on; a run that starts anew has skipped nothing.
        self.skips = Lines(run_dir / SKIPPED, None if resumed_step is None else sys.maxsize)
        self.tally = Tally(run.checkpoint.best, run.checkpoint.mode)
        self.tally.read(self.metrics.path)
        self.alerts, self.step = run.log.alerts, resumed_step or 0
        self.tracker: Background | None = None
        if run.log.tracker == "wandb":
            from distft.log.last_word import read_session
            from distft.log.wandb import WandbTracker, new_id

            # Also of a launch that died before its first checkpoint: a run folder is one W&B run.
            known = wandb_id or (None if run.resume == "never" else read_session(run_dir).get("id"))
            self.wandb_id = known or new_id()
            facts = {"world_size": world.size, "num_steps": num_steps}
            num_before = self.metrics.num_before + self.answers.num_before if known else None
            system = Gathering(run_dir, world.size)
            wandb_run = WandbTracker(run, run_dir, facts, self.wandb_id, num_before, self.say, system)
            self.tracker = Background(wandb_run, "W&B", self.say)
            self.tracker.call("summary", {"status": "running", **self.tally.values})
        elif run.log.tracker == "tensorboard":
            from distft.log.tensorboard import TensorBoardTracker

            self.tracker = Background(TensorBoardTracker(run_dir, resumed_step), "TensorBoard", self.say)

    def train(self, step: int, record: Mapping[str, Any]) -> None:
        """One training record: `step` counts finished optimizer steps."""
        if self.active:
            self.step = step
            self.metrics.write({"step": step, "split": "train", **record})
            self.screen.train(step, record)
            if self.tracker:
                self.tracker.call("metrics", "train", step, dict(record))

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """One evaluation of the weights after `step` optimizer steps."""
        if self.active:
            self.metrics.write({"step": step, "split": "eval", **record})
            self.screen.evaluation(step, record)
            self.tally.note(step, record)
            if self.tracker:
                self.tracker.call("metrics", "eval", step, dict(record))
                self.tracker.call("summary", dict(self.tally.values))

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
            self.tally.read(self.metrics.path)
            if self.tracker:
                self.tracker.call("go_back", step)
                self.tracker.call("summary", dict(self.tally.values))

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if self.active:
            self.screen.say(text)

    def spike(self, text: str) -> None:
        """A spike of the loss and what was done about it: said, and told by an alert."""
        self.say(text)
        self.alert("spike", "Spike of the loss", text, "WARN")

    def alert(self, kind: str, title: str, text: str, level: str) -> None:
        """Have the tracker send a message where `log.alerts` names its kind."""
        if self.active and self.tracker and kind in self.alerts:
            self.tracker.call("alert", title, text, level)

    def finish(self, status: str, summary: Mapping[str, Any], reason: str = "") -> None:
        """The end of the run: `done`, or why it ended; `summary`: best and last metrics. Later calls do nothing."""
        if self.finished:
            return
        self.finished = True
        if self.sampler:
            self.sampler.stop()
        if self.active:
            self.screen.close()
            best = summary.get("best", self.tally.values.get("best"))
            text = f"{status} after step {self.step}" + (
                f"; best {self.tally.key} {best:.6g}" if best is not None else ""
            )
            level = "INFO" if status in WELL else "WARN" if status.startswith("saved") else "ERROR"
            self.alert("end", f"Ended: {status.replace('_', ' ')}", redact(f"{text}. {reason}".strip()), level)
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
        if error is not None:
            self.finish(getattr(error, "status", "failed"), {}, f"{kind.__name__ if kind else 'Error'}: {error}"[:500])
        self.finish("failed", {})
