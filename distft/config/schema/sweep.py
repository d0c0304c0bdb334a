from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema.knob import choice


@dataclass
class Sweep:
    """How the jobs of `-m` are chosen and run; a single run has no use for it."""

    jobs: Any = 1
    """Jobs that run at the same time on this machine, each with devices of its own: `launch.ranks` GPUs, or its share
    of the cores where there is none. auto: as many as the devices allow. With a launcher of Hydra's that sends jobs
    elsewhere: how many trials hydra/sweeper=optuna asks for at once."""

    space: dict[str, Any] = field(default_factory=dict)
    """Knobs and their values, for an experiment file, as they would stand on the command line (which comes before):
    {optim.lr: 'tag(log, interval(1e-5, 1e-3))', seed: '1,2'}."""

    sampler: str = choice("tpe", "random", "grid")
    """Of hydra/sweeper=optuna. tpe: tree-structured Parzen estimator (Bergstra et al. 2011), which learns from the
    trials before; random; grid: every combination once."""

    trials: int | None = None
    """Of hydra/sweeper=optuna: trials in all, failed and pruned ones too. Default: the whole grid, else 20."""

    seed: int = 0
    """Of hydra/sweeper=optuna: what it proposes. A trial's values depend on it, on the trial's number and on the
    results before, so that an interrupted sweep goes on as if it had not been."""

    pruner: str = choice("none", "median", "halving")
    """Of hydra/sweeper=optuna: which trials end early, by `checkpoint.best` at the same step. median: those worse than
    the median of the trials before; halving: all but the best quarter, at steps 4 times as far each time (ASHA, Li et
    al. 2020). Needs `eval.every`."""

    prune_after_trials: int = 5
    """pruner=median: trials that have to be complete before one is pruned."""

    prune_after_steps: int = 0
    """No trial is pruned before it has made so many steps."""
