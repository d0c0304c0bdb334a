"""The life of a run on one screen: `Fit.run`, and one optimizer step: `Fit.step`."""

from __future__ import annotations

import datetime
import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distft import heartbeat
from distft.config.schema import Run
from distft.errors import DeadlineStop, SignalStop, UserMistake
from distft.evaluation.loss import evaluate
from distft.guard import GoBack, Guard, Spike
from distft.launch.deadline import Clock
from distft.launch.stop import STOP_SIGNALS, name_of
from distft.log import SKIPPED
from distft.objective.trainee import LossRequest, LossSums
from distft.optim import lr_at
from distft.perf import memory, trim
from distft.world import World, longest_wait, seed_everything, seed_of, sum_over

if TYPE_CHECKING:
    from distft.checkpoint.behind import WriteBehind
    from distft.checkpoint.state import TrainState
    from distft.data.batch import Step
    from distft.data.batches import Plan
    from distft.log import Log
    from distft.strategy.base import Strategy


COLLECT_EVERY = 50  # steps between collections of garbage


class Agreement:
    """Flags that any rank may raise and that all ranks see at the same step, one step after they were raised.

    The reduction of a step is started behind it and awaited behind the next one, so that nothing waits for it.
    """

    def __init__(self, world: World, num_flags: int, timeout: float = 600.0) -> None:
        longest = datetime.timedelta(seconds=timeout)
        self.group = dist.new_group(backend="gloo", timeout=longest) if world.size > 1 else None
        self.flags = torch.zeros(num_flags, dtype=torch.int32)  # on the host, whatever the device
        self.pending: Any = None

    def ask(self, *raised: bool) -> list[bool]:
        """Raise each flag or not for this step; returns what any rank said on the step before."""
        heartbeat.mark("agreement")
        if self.group is None:
            return list(raised)
        agreed = [False] * len(raised)
        if self.pending is not None:
            self.pending.wait()
            agreed = [flag > 0 for flag in self.flags.numpy()]
        self.flags.numpy()[:] = raised
        self.pending = dist.all_reduce(self.flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed


def collect_at(step: int) -> None:
    """Collect garbage where `step`, the same number on all ranks, is due."""
    if step % COLLECT_EVERY == 0:
        gc.collect()


@contextmanager
def scheduled_collection() -> Iterator[None]:
    """Let Python look for garbage where `collect_at` is called alone.

    Python's own schedule stops each rank at another moment, and all wait for the one that is stopped. What lives
    already, modules and their like, is not looked at again (torchtitan's `gc_freq` is the model).
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@dataclass
class Interval:
    """What was done since the last training record: the throughput is its mean, so that no step is waited for."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0


@dataclass
class Fit:
    """Everything a run needs, given by verbs/train.py; `state` is what a checkpoint holds of it."""

    config: Run
    world: World
    strategy: Strategy
    plan: Plan
    evaluation_steps: Callable[[], Iterable[Step]] | None
    steps: Callable[[int, int], Iterable[Step]]  # global batches from first to last, the next one made meanwhile
    num_steps: int
    source_names: Sequence[str]
    eval_source_names: Sequence[str]
    log: Log
    state: TrainState
    checkpoints: WriteBehind
    stop_requested: Callable[[], list[bool]]  # which of STOP_SIGNALS have arrived at this process
    flops: Callable[[Step], float]  # model FLOPs of one global batch
    peak_flops: float | None  # of all ranks together; None where unknown
    prune_requested: Callable[[], bool] = lambda: False  # by the sweep that this run belongs to; on rank 0 alone
    clock: Clock = field(default_factory=Clock)  # with a deadline on rank 0 alone
    interval: Interval = field(default_factory=Interval, init=False)
    guard: Guard = field(init=False)
    saved_at: int = field(default=-1, init=False)  # step of the last checkpoint

    def __post_init__(self) -> None:
        self.guard = Guard(self.config, self.world)

    def run(self) -> str:
        """Train to the end. Returns `done`, `early_stopped` or `pruned`.

        Raises:
            GuardStop: `guard.patience` steps in a row had a non-finite loss or gradient norm or were dropped for a
                spike of the loss; or the loss spiked again and again behind the same checkpoint.
            SignalStop: a signal arrived; a checkpoint was saved by all ranks at the same step.
            UserMistake: a checkpoint could not be written; all ranks raise at the same step, soon after.
        """
        longest = longest_wait(self.config.guard.stall_seconds)
        agreement = Agreement(self.world, num_flags=3 + len(STOP_SIGNALS), timeout=longest)
        with scheduled_collection():
            while True:
                try:
                    return self.train(agreement)
                except GoBack as back:
                    spike = back.spike
                self.go_back(spike)

    def train(self, agreement: Agreement) -> str:
        """From the step that `state` stands at to the end."""
        config, state = self.config, self.state
        heartbeat.mark("start", state.step)
        self.interval = Interval()
        self.saved_at = state.step
        self.guard.restore(state.recent_losses)
        if config.eval.at_start and state.step == 0 and state.first_evaluation is None:
            self.evaluate()
        if config.guard.spike == "rollback" and not self.checkpoints.holds(state.step):
            self.saved_at = -1  # a fresh start, or from another folder: there must be something to go back to
            self.checkpoint()

        for step in self.steps(state.step, self.num_steps):
            taken = None if step.left_out else self.step(step)
            state.step += 1
            state.cursor = self.plan.cursor(state.step)
            state.count(self.source_names, step.source_tokens, step.source_supervised)
            self.settle()
            if taken:
                self.guard.note(taken[0], step)
            if taken and (state.step == 1 or self.due(config.log.every)):
                self.record(step, *taken)
            if state.step == self.num_steps:
                self.settle()
            improved = self.due(config.eval.every) and self.evaluate()
            out_of_patience = 0 < config.early_stopping.patience <= state.evaluations_without_best
            keeps_best = config.checkpoint.every > 0 or config.early_stopping.patience > 0
            if self.due(config.checkpoint.every) or out_of_patience or (improved and keeps_best):
                self.checkpoint(last=out_of_patience or state.step == self.num_steps)
            if out_of_patience:
                return "early_stopped"
            wishes = (self.prune_requested(), self.deadline_near(), *self.stop_requested())
            failed, pruned, late, *signals = agreement.ask(self.checkpoints.failed, *wishes)
            if failed:
                self.checkpoints.wait()
            if (late or any(signals)) and state.step < self.num_steps:
                self.checkpoint(last=True)
                self.checkpoints.wait(needed=True)
                raise self.stop(signals)
            if pruned and state.step < self.num_steps:
                return "pruned"
            collect_at(state.step)

        return "done"

    def step(self, step: Step) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the gradient norm and this rank's NLL sums by source, both on the device."""
        config, strategy, world = self.config, self.strategy, self.world
        nll = torch.zeros(len(self.source_names) + 1, device=world.device)  # by source, then the auxiliary loss
        for index, batch in enumerate(step.micro_batches):
            # Random numbers depend on the micro-batch alone, so that neither resuming nor the world size changes them.
            number, part = step.place(index)
            first_bin = step.first_bin + world.data_rank + world.data_size * config.batch.micro_size * number
            seed_everything(seed_of(config.seed, self.state.step, first_bin, *([part] if part else [])))
            request = LossRequest(
                batch.to(world.device),
                scale=1 / max(1, step.num_supervised),
                share=batch.num_tokens / max(1, step.num_tokens),
                num_sources=len(self.source_names),
            )
            heartbeat.mark("forward")
            answer = strategy.forward(request)
            assert isinstance(answer, LossSums)
            nll[:-1] += answer.nll
            nll[-1] += answer.auxiliary
            last = index == len(step.micro_batches) - 1
            if last:
                self.guard.reduce(nll[:-1])
            heartbeat.mark("backward")
            strategy.backward(answer.loss, last=last)
        heartbeat.mark("optimizer step")
        self.interval.steps += 1
        self.interval.tokens += step.num_tokens
        self.interval.flops += self.flops(step)
        keep = self.guard.compare(step.num_supervised)
        return strategy.step(lr_at(self.state.step, self.num_steps, config.optim, config.schedule), keep), nll

    def deadline_near(self) -> bool:
        """Whether this rank's clock says that there is no time for another step, and a checkpoint after it."""
        every, step = self.config.eval.every, self.state.step
        evaluates = every > 0 and (step + 2) // every > step // every
        return self.clock.near(evaluates, self.checkpoints.seconds, self.checkpoints.writing)

    def stop(self, signals: Sequence[bool]) -> SignalStop:
        """What all ranks agreed to stop for: the signals that came, else the deadline."""
        came = [number for number, agreed in zip(STOP_SIGNALS, signals, strict=True) if agreed]
        complete = f"after step {self.state.step}; the checkpoint of this step is complete."
        if came:
            names = " and ".join(name_of(number) for number in came)
            return SignalStop(f"Stopped by {names} {complete}", signal.SIGUSR1 in came)
        deadline = self.clock.deadline
        why = self.clock.why(self.checkpoints.seconds) if deadline else "rank 0's deadline"
        return DeadlineStop(f"Stopped for {why} {complete}", deadline is not None and deadline.by_slurm)

    def due(self, every: int) -> bool:
        return self.state.step == self.num_steps or (every > 0 and self.state.step % every == 0)

    def settle(self) -> None:
        """Judge the newest step that has not been judged: once its numbers are there, and before it is saved.

        Raises:
            GoBack: the loss spiked, and `guard.spike` says rollback.
            GuardStop: see `run`.
        """
        told = self.guard.settle(self.state, self.rows_of)
        if told:
            self.log.spike(told)

    def rows_of(self, step: Step) -> list[str]:
        return self.plan.names(place for batch in step.micro_batches for place in batch.documents)

    def go_back(self, spike: Spike) -> None:
        """Take up the last checkpoint, and pass over the global batch of `spike` from now on. All ranks alike."""
        heartbeat.mark("checkpoint")
        state = self.state
        saved = self.checkpoints.load(state.step, say=self.log.say)
        self.guard.look_at_rollbacks(state, saved.step, spike)
        state.rollbacks.append(saved.step)
        state.go_back(saved)
        self.plan.skipped.add(spike.index)
        state.cursor = self.plan.cursor(state.step)
        self.guard.restore(state.recent_losses)
        self.log.go_back(state.step)
        ids = self.plan.sample_ids(spike.index)
        numbers = {"loss": spike.loss, "median": spike.median, "score": spike.score, "back_to": state.step}
        self.log.skipped(spike.index + 1, {**numbers, "samples": ids})
        self.log.spike(
            f"{spike.told(self.config.guard)}; back to step {state.step}, to go on without the global batch of step "
            f"{spike.index + 1}: its {len(ids)} rows stand in {SKIPPED}"
        )

    def record(self, step: Step, norm: Tensor, nll: Tensor) -> None:
        """Log this step. The only place of the training path where the host waits for the device."""
        heartbeat.mark("record")
        self.settle()
        state, interval = self.state, self.interval
        *by_source, auxiliary = sum_over(self.world, nll.clone()).double().tolist()
        seconds = (time.perf_counter() - interval.started) / max(1, interval.steps)
        record: dict[str, Any] = {
            "loss": sum(by_source) / max(1, step.num_supervised),
            "grad_norm": float(norm),
            "learning_rate": lr_at(state.step - 1, self.num_steps, self.config.optim, self.config.schedule),
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
            "tokens_per_second": interval.tokens / max(1, interval.steps) / seconds,
            "seconds": seconds,
            "skipped": state.skipped,
            **memory(self.world.device),
        }
        if auxiliary:
            record["auxiliary_loss"] = auxiliary
        if self.peak_flops:
            record["mfu"] = interval.flops / max(1, interval.steps) / seconds / self.peak_flops
        for index, name in enumerate(self.source_names):
            if step.source_supervised[index]:
                record[f"source/{name}/loss"] = by_source[index] / step.source_supervised[index]
            record[f"source/{name}/tokens"] = step.source_tokens[index]
        self.log.train(state.step, record)
        self.interval = Interval()

    def evaluate(self) -> bool:
        """Evaluate, log, and say whether `checkpoint.best` is better than ever before."""
        if self.evaluation_steps is None:
            return False
        heartbeat.mark("evaluation")
        state, started = self.state, time.perf_counter()
        record = evaluate(self.strategy, self.evaluation_steps(), self.world, self.eval_source_names)
        self.log.evaluation(state.step, record)
        self.clock.evaluated(time.perf_counter() - started)
        self.interval.started += time.perf_counter() - started
        key = self.config.checkpoint.best.removeprefix("eval/")
        if key not in record:
            raise UserMistake(
                f"checkpoint.best={self.config.checkpoint.best} is not measured; this run has: "
                + ", ".join(f"eval/{name}" for name in record)
            )
        state.last_evaluation = record
        if state.step == 0:
            state.first_evaluation = record
            return False
        sign = 1 if self.config.checkpoint.mode == "min" else -1
        if state.best is None or sign * record[key] < sign * state.best:
            state.best, state.best_step, state.evaluations_without_best = record[key], state.step, 0
            return True
        state.evaluations_without_best += 1
        return False

    def checkpoint(self, last: bool = False) -> None:
        """Take a checkpoint, once a step; it is written behind the next steps, if it is not the `last`."""
        if self.saved_at != self.state.step:
            heartbeat.mark("checkpoint")
            started = time.perf_counter()
            if last:
                trim()
            self.settle()
            self.state.recent_losses = self.guard.saved()
            self.checkpoints.save(self.state, last)
            self.saved_at = self.state.step
            self.interval.started += time.perf_counter() - started
