"""What keeps useless numbers out of the weights: steps that are not finite, and spikes of the loss.

Everything is decided on the device, from numbers that are the same bits on every rank; the host reads them one step
later, when reading no longer waits, and so all ranks say and do the same at the same step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distft.config.schema import Guard as Config
from distft.config.schema import Run
from distft.errors import GuardStop
from distft.log import SKIPPED
from distft.world import World

if TYPE_CHECKING:
    from distft.checkpoint.state import TrainState
    from distft.data.batch import Step

DEVIATION = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
LEAST_DEVIATION = 0.01  # of the median: a curve that has become flat is not all spikes


class Late:
    """Numbers on the device that the host reads one step later, when reading them no longer waits."""

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        if values.device.type == "cuda":
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event: Any = torch.cuda.Event()
            self.event.record()
        else:
            self.host, self.event = values.clone(), None

    def read(self) -> Any:
        """The numbers, in lists as the tensor had dimensions."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


@dataclass(frozen=True)
class Spike:
    """A step whose loss stood far above those before it."""

    index: int  # of the step, from 0
    loss: float  # token mean over the global batch
    median: float  # of the steps before
    score: float  # how far above it, in standard deviations

    def told(self, guard: Config) -> str:
        return (
            f"Step {self.index + 1}: the loss rose to {self.loss:.4g} from a median of {self.median:.4g} in the "
            f"{guard.spike_window} steps before, a score of {self.score:.3g} (guard.spike_score="
            f"{guard.spike_score:g})"
        )


class GoBack(Exception):
    """Raised on all ranks at the same step: training goes on from the last checkpoint, over the batch of `spike`."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike)
        self.spike = spike


class Losses:
    """The losses of the last steps on the device, and how far a new one stands above them.

    The robust z-score (Iglewicz & Hoaglin 1993): the distance from the median in units of 1.4826 times the median
    absolute deviation, which a few outliers among the old ones do not move. `remembers`: whether a spike joins them, so
    that a loss that has risen for good is taken as the new level after half a window.
    """

    def __init__(self, window: int, spike_score: float, remembers: bool, device: torch.device) -> None:
        self.spike_score, self.remembers = spike_score, remembers
        self.recent = torch.full((window,), math.nan, device=device)  # the newest last; not judged while one is missing

    def judge(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Median of the losses before, score of this one, and whether it is a spike; a finite one is then remembered.

        A loss that is not finite is no spike: it is kept out of the weights anyway.
        """
        median = self.recent.median()
        deviation = DEVIATION * (self.recent - median).abs().median()
        score = (loss - median) / deviation.maximum(LEAST_DEVIATION * median.abs()).clamp(min=1e-8)
        finite = loss.isfinite()
        spike = (score >= self.spike_score) & finite
        joins = finite if self.remembers else finite & ~spike
        self.recent = torch.where(joins, torch.cat((self.recent[1:], loss[None])), self.recent)
        return median, score, spike

    def saved(self) -> list[float]:
        """For a checkpoint. Waits for the device."""
        return [loss for loss in self.recent.tolist() if math.isfinite(loss)]

    def restore(self, losses: Sequence[float]) -> None:
        window = len(self.recent)
        losses = list(losses)[-window:]
        self.recent.copy_(torch.tensor([math.nan] * (window - len(losses)) + losses))


class Guard:
    """The guard of one run.

    In each step `reduce` before the last backward pass, `compare` before the update, `note` behind it; `settle` a step
    later.
    """

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        self.losses: Losses | None = None
        guard = run.guard
        if guard.spike != "none":
            remembers = guard.spike == "warn"
            self.losses = Losses(guard.spike_window, guard.spike_score, remembers, world.device)
        self.sum: Tensor  # of the step's loss, over the ranks once `work` is done
        self.work: Any = None
        self.compared: tuple[Tensor, ...] = ()
        self.last: tuple[Late, Step] | None = None  # the numbers of the newest step that nobody has read yet

    def restore(self, losses: Sequence[float]) -> None:
        """Go on behind the steps with these losses; what was noted since is forgotten."""
        self.last, self.compared = None, ()
        if self.losses:
            self.losses.restore(losses)

    def saved(self) -> list[float]:
        """What `restore` takes, for a checkpoint."""
        return self.losses.saved() if self.losses else []

    @torch.no_grad()
    def reduce(self, nll: Tensor) -> None:
        """Start to sum a step's loss over the ranks: before its last backward pass, behind which nothing waits for it.

        nll: this rank's sums, [sources].
        """
        if self.losses is not None:
            self.sum = nll.sum()
            self.work = dist.all_reduce(self.sum, async_op=True) if self.world.size > 1 else None

    @torch.no_grad()
    def compare(self, num_supervised: int) -> bool | Tensor:
        """Compare the loss that `reduce` has summed with those before it. Returns whether the update is kept: on the
        device where that depends on the loss, so that nothing waits for it.

        num_supervised: targets of the global batch.
        """
        if self.losses is None:
            return True
        if self.work is not None:
            self.work.wait()
        loss = self.sum / max(1, num_supervised)
        median, score, spike = self.losses.judge(loss)
        self.compared = loss, median, score, spike
        return ~spike if self.run.guard.spike == "skip" else True

    def note(self, norm: Tensor, step: Step) -> None:
        """Keep the gradient norm of the step, and what `compare` found, to be read when they are there."""
        numbers = norm[None]
        if self.compared:
            numbers = torch.stack([norm, *(number.to(norm.dtype) for number in self.compared)])
        self.last = Late(numbers), step

    def settle(self, state: TrainState, rows: Callable[[Step], list[str]]) -> str:
        """Judge the newest step that has not been judged, and count it. Returns what is to be said of it, or nothing.

        rows: names of the rows of a step on this rank.

        Raises:
            GoBack: a spike, under guard.spike=rollback.
            GuardStop: `guard.patience` steps in a row have changed no weight.
        """
        if self.last is None:
            return ""
        (late, step), self.last = self.last, None
        norm, *compared = late.read()
        spike = Spike(step.index, *compared[:3]) if compared and compared[3] and math.isfinite(norm) else None
        state.spikes += spike is not None
        if math.isfinite(norm) and not (spike and self.run.guard.spike == "skip"):
            state.skipped_in_a_row = 0
        else:
            state.skipped += 1
            state.skipped_in_a_row += 1
            self.look_at_patience(state, step, rows)
        if spike is None:
            return ""
        if self.run.guard.spike == "rollback":
            raise GoBack(spike)
        skips = self.run.guard.spike == "skip"
        done = "its update was dropped on all ranks" if skips else "guard.spike=warn lets it pass"
        return f"{spike.told(self.run.guard)}; {done}. Rows of rank {self.world.rank}: {few(rows(step))}"

    def look_at_patience(self, state: TrainState, step: Step, rows: Callable[[Step], list[str]]) -> None:
        if state.skipped_in_a_row < self.run.guard.patience:
            return
        what = "loss or the gradient norm was not finite"
        if self.run.guard.spike == "skip":
            what += ", or the loss spiked,"
        raise GuardStop(
            f"The {what} in {state.skipped_in_a_row} steps in a row, the last of them step {step.index + 1}; none of "
            f"them changed a weight. Rows of rank {self.world.rank} in that step: {few(rows(step))}. Lower optim.lr, "
            "lengthen schedule.warmup or look at the rows with `distft data show`; guard.patience sets how many are "
            "allowed."
        )

    def look_at_rollbacks(self, state: TrainState, back_to: int, spike: Spike) -> None:
        """
        Raises:
            GuardStop: the run has gone back to this checkpoint `guard.max_rollbacks` times.
        """
        most = self.run.guard.max_rollbacks
        if state.rollbacks.count(back_to) < most:
            return
        raise GuardStop(
            f"{spike.told(self.run.guard)}; the run has gone back to step {back_to} "
            f"{'once' if most == 1 else f'{most} times'} already, over other batches, and the loss spikes again. "
            f"Lower optim.lr, look at the rows in {SKIPPED}, or resume from an older checkpoint; guard.max_rollbacks "
            "sets how often is allowed."
        )


def few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def read_skipped(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run folder's `skipped.jsonl` that are complete; none without the file."""
    path = run_dir / SKIPPED
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
