"""A search that outlives its process: Optuna's study in the sweep's folder, asked for trials and told their ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.schema.sweep import Sweep
from distft.errors import Mistakes, UserMistake
from distft.sweep.space import Dimension, size, told, word_of

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"
NAME = "sweep"  # of the one study in it
LOCK = ".sweep.lock"
DEFAULT_TRIALS = 20


@dataclass(frozen=True)
class Proposal:
    """One trial: its number is its job's."""

    number: int
    words: list[str]  # overrides
    goes_on: bool  # it was interrupted before


def optuna_module() -> Any:
    """
    Raises:
        UserMistake: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserMistake("hydra/sweeper=optuna needs Optuna, which is missing: pip install 'distft[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def num_trials(sweep: Sweep, dimensions: Sequence[Dimension]) -> int:
    """Trials in all."""
    combinations = size(dimensions)
    if sweep.sampler == "grid":
        assert combinations is not None
        return min(sweep.trials or combinations, combinations)
    return sweep.trials or min(DEFAULT_TRIALS, combinations or DEFAULT_TRIALS)


class Search:
    """Optuna's study and who asks it. Methods may be called from several threads."""

    def __init__(
        self,
        folder: Path | None,
        sweep: Sweep,
        dimensions: Sequence[Dimension],
        base: dict[str, Any],
        mode: str,
        side_by_side: bool = False,
    ) -> None:
        """Open the study in `folder`, or begin it (None: in memory).

        Args:
            base: the knobs that all trials share, by name.
            mode: min or max, of what the trials report.
            side_by_side: several trials run at once.

        Raises:
            UserMistake, Mistakes: Optuna is missing, or the study there is another search.
        """
        self.optuna = optuna_module()
        self.sweep, self.dimensions, self.side_by_side = sweep, list(dimensions), side_by_side
        self.total = num_trials(sweep, dimensions)
        self.guard = threading.RLock()
        direction = "minimize" if mode == "min" else "maximize"
        storage = None
        if folder is not None:
            wait = {"connect_args": {"timeout": 60}}
            storage = self.optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}", engine_kwargs=wait)
        self.neutral = self.optuna.samplers.RandomSampler()  # where nothing is proposed a sampler has nothing to do
        self.study: optuna.Study = self.optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction=direction,
            load_if_exists=True,
            sampler=self.neutral,
            pruner=self.pruner(),
        )
        self.remember(base, folder)
        self.trials: dict[int, optuna.Trial] = {}  # that run now
        self.reported: dict[int, int] = {}  # by trial, its last step
        self.interrupted = [trial for trial in self.study.get_trials() if not trial.state.is_finished()]

    def remember(self, base: dict[str, Any], folder: Path | None) -> None:
        """Hold the search against the one that is there, or write it down."""
        space, before = told(self.dimensions), self.study.user_attrs
        base = json.loads(json.dumps(base))  # as it is read back
        if "space" not in before:
            self.study.set_user_attr("space", space)
            self.study.set_user_attr("base", base)
            return
        problems = differences("searches over", before["space"], space) + differences("has", before["base"], base)
        if problems:
            cure = "Give the same words to go on with it, or name a new folder: hydra.sweep.dir=…"
            raise Mistakes([f"hydra.sweep.dir={folder} holds a study of another search: {'; '.join(problems)}. {cure}"])

    def pruner(self) -> Any:
        pruners, sweep = self.optuna.pruners, self.sweep
        if sweep.pruner == "median":
            return pruners.MedianPruner(sweep.prune_after_trials, sweep.prune_after_steps)
        if sweep.pruner == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=max(1, sweep.prune_after_steps))
        return pruners.NopPruner()

    def sampler(self, number: int) -> Any:
        """The sampler of one trial. Made anew each time, since a study does not keep a sampler's random numbers."""
        import numpy as np

        samplers = self.optuna.samplers
        seed = int(np.random.SeedSequence([self.sweep.seed, number]).generate_state(1)[0])
        if self.sweep.sampler == "grid":
            grid = {dimension.name: list(dimension.grid() or ()) for dimension in self.dimensions}
            return samplers.GridSampler(grid, seed=self.sweep.seed)  # which numbers the combinations by it
        if self.sweep.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, constant_liar=self.side_by_side)

    def ask(self) -> Proposal | None:
        """The next trial: first those that were interrupted, then new ones; None when there are enough."""
        with self.guard:
            if self.interrupted:
                frozen = self.interrupted.pop(0)
                trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
                return self.proposal(trial, goes_on=True)
            number = len(self.study.get_trials(deepcopy=False))
            if number >= self.total:
                return None
            self.study.sampler = self.sampler(number)
            try:
                trial = self.study.ask({dimension.name: dimension.distribution() for dimension in self.dimensions})
            finally:
                self.study.sampler = self.neutral
            return self.proposal(trial, goes_on=False)

    def proposal(self, trial: optuna.Trial, goes_on: bool) -> Proposal:
        self.trials[trial.number] = trial
        self.reported[trial.number] = max(self.study.trials[trial.number].intermediate_values, default=-1)
        words = [word_of(dimension, trial.params[dimension.name]) for dimension in self.dimensions]
        return Proposal(trial.number, words, goes_on)

    def report(self, number: int, step: int, value: float) -> bool:
        """Take in an evaluation of a running trial, once a step. Returns whether the trial should end."""
        with self.guard:
            trial = self.trials.get(number)
            if trial is None:
                return False
            if step > self.reported[number]:  # one that went on from a checkpoint evaluates some steps again
                trial.report(value, step)
                self.reported[number] = step
            return step >= self.sweep.prune_after_steps and trial.should_prune()

    def tell(self, number: int, status: str, value: float | None) -> None:
        """How a trial ended. `status`: of its result.json, or failed; `value`: the objective where there is one."""
        states = self.optuna.trial.TrialState
        with self.guard:
            trial = self.trials.pop(number)
            if status == "pruned":
                self.study.tell(trial, state=states.PRUNED)
            elif status in ("done", "early_stopped") and value is not None:
                self.study.tell(trial, value)
            else:
                self.study.tell(trial, state=states.FAIL)

    def standing(self) -> str:
        """How far it is: trials by their state."""
        states: dict[str, int] = {}
        for trial in self.study.get_trials(deepcopy=False):
            name = "failed" if trial.state.name == "FAIL" else trial.state.name.lower()
            states[name] = states.get(name, 0) + 1
        told = ", ".join(f"{count} {name}" for name, count in sorted(states.items()))
        return f"{sum(states.values())} of {self.total} trials" + (f": {told}" if told else "")


def differences(verb: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two searches, in words."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"it {verb} {name}={shown(before, name)}, not {shown(now, name)}" for name in names]


def shown(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "nothing"
    value = values[name]
    return " ".join(map(str, value[2:])) if isinstance(value, list) and len(value) > 2 else str(value)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder, as long as this process lives.

    Raises:
        UserMistake: another one sweeps there.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserMistake(
            f"hydra.sweep.dir={folder} is being swept by another process. Wait for its end, or name another folder."
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
