"""How much of the difference between jobs each knob makes: Optuna's PED-ANOVA (Watanabe et al. 2023), of any sweep."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from distft.report.read import Job, SweepFolder, told

FEWEST_JOBS = 4


def importance(sweep: SweepFolder) -> dict[str, float]:
    """Each knob's share of the whole, the largest first; empty where there are too few jobs to tell.

    A study is made of the jobs that ran to their end, whoever chose their values.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    jobs = [job for job in sweep.jobs if job.counts]
    names = [name for name in sweep.knobs if len({told(job.values[name]) for job in jobs}) > 1]
    if len(jobs) < FEWEST_JOBS or not names or len({job.objective for job in jobs}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if sweep.smaller_is_better else "maximize")
    distributions: dict[str, BaseDistribution] = {}
    for name in names:
        numbers = numbers_of(jobs, name)
        if numbers is None or name == "seed":
            distributions[name] = CategoricalDistribution(sorted({told(job.values[name]) for job in jobs}))
        else:
            low, high = min(numbers), max(numbers)
            distributions[name] = FloatDistribution(low, high, log=is_logarithmic(numbers))
    for job in jobs:
        params: dict[str, Any] = {
            name: told(job.values[name])
            if isinstance(distributions[name], CategoricalDistribution)
            else float(job.values[name])
            for name in names
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=job.objective))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(study))


def numbers_of(jobs: Sequence[Job], name: str) -> list[float] | None:
    """A knob's values as numbers; None where they are something else."""
    values = [job.values[name] for job in jobs]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    return [float(value) for value in values]


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether values span so much that their logarithms tell more."""
    return min(numbers) > 0 and max(numbers) / min(numbers) >= 20
