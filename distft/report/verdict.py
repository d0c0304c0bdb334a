"""What of a sweep's differences is more than noise: repetitions by seed, and the rule by which a winner is named. Pure.

The rule. Settings are what jobs have in common but for their seed. The best setting by its mean is named the winner if,
against each other setting that was repeated, Welch's t-test (one-sided, unequal variances) rejects at LEVEL divided by
the number of repeated settings, and no setting that ran once has a better value than that mean. A setting that is not
truly the best then becomes the winner with a probability of at most LEVEL (a union bound over the settings), however
many there are. Without repetitions the noise is unknown and no winner is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from distft.report.read import Job, SweepFolder, told

LEVEL = 0.05


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in nothing but their seed, and their values."""

    words: str  # knob=value …
    jobs: tuple[Job, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Verdict:
    winner: Setting | None
    sentence: str


def settings_of(sweep: SweepFolder) -> list[Setting]:
    """The settings of jobs that count, the best mean first. A seed that ran twice counts once."""
    groups: dict[str, dict[str, Job]] = {}
    for job in sweep.ranked():
        words = " ".join(f"{name}={told(job.values[name])}" for name in sweep.settings)
        groups.setdefault(words, {}).setdefault(told(job.config.get("seed")), job)
    settings = [
        Setting(words, tuple(jobs.values()), tuple(job.objective or 0.0 for job in jobs.values()))
        for words, jobs in groups.items()
    ]
    sign = 1 if sweep.smaller_is_better else -1
    return sorted(settings, key=lambda setting: sign * setting.mean)


def decide(settings: Sequence[Setting], smaller_is_better: bool) -> Verdict:
    """Whether there is a winner, and the sentence that says why or why not. `settings`: the best first."""
    if not settings:
        return Verdict(None, "No job has come to its end with an evaluation: there is nothing to compare.")
    if len(settings) == 1:
        return Verdict(None, f"One setting alone: there is nothing to compare.{spread_told(settings[0])}")
    repeated = [setting for setting in settings if len(setting.values) > 1]
    lowest = "lowest" if smaller_is_better else "highest"
    if not repeated:
        return Verdict(
            None,
            f"No winner: every setting ran with one seed, so the noise is unknown. The {lowest} value is that of "
            f"{settings[0].words} ({settings[0].mean:.6g}). Repeat the best settings with several seeds: seed=1,2,3.",
        )
    best = repeated[0]
    sign = 1 if smaller_is_better else -1
    single = [one for one in settings if len(one.values) == 1 and sign * one.mean <= sign * best.mean]
    if single:
        return Verdict(
            None,
            f"No winner: {single[0].words} has the {lowest} value ({single[0].mean:.6g}) but ran with one seed. Repeat "
            f"it: seed=1,2,3. Of what was repeated {best.words} is best: {best.mean:.6g}{spread_told(best)}",
        )
    if len(repeated) == 1:
        return Verdict(None, f"No winner: only {best.words} was repeated, and one seed tells nothing of the others.")
    level = LEVEL / len(repeated)
    chances = [(chance(best, other, smaller_is_better), other) for other in repeated[1:]]
    highest, nearest = max(chances, key=lambda pair: pair[0])
    rule = f"Welch's t-test, one-sided, at {LEVEL:g} / {len(repeated)} settings = {level:.3g}"
    if highest > level:
        within = sum(value > level for value, _ in chances)
        return Verdict(
            None,
            f"No winner: the best mean is that of {best.words} ({best.mean:.6g}), but "
            f"{within} other setting{'s are' if within > 1 else ' is'} within the noise, {nearest.words} "
            f"({nearest.mean:.6g}) with p = {highest:.2g} ({rule}).",
        )
    once = len(settings) - len(repeated)
    left_out = f" {once} settings with one seed are worse than its mean and were not tested." if once else ""
    return Verdict(
        best,
        f"Winner: {best.words}, mean {best.mean:.6g} over {len(best.values)} seeds; against every other setting "
        f"p <= {highest:.2g} ({rule}).{left_out}",
    )


def spread_told(setting: Setting) -> str:
    if setting.spread is None:
        return ""
    num, mean, spread = len(setting.values), setting.mean, setting.spread
    return f" Over {num} seeds the mean is {mean:.6g}, the standard deviation {spread:.2g}."


def chance(best: Setting, other: Setting, smaller_is_better: bool) -> float:
    """p of Welch's one-sided test that `best` is better than `other`: how likely such a distance is by noise alone."""
    if not best.spread and not other.spread:  # equal values tell no spread: not even of several seeds
        return 1.0
    from scipy.stats import ttest_ind_from_stats

    found = ttest_ind_from_stats(
        best.mean,
        best.spread,
        len(best.values),
        other.mean,
        other.spread,
        len(other.values),
        equal_var=False,
        alternative="less" if smaller_is_better else "greater",
    )
    return 1.0 if math.isnan(found.pvalue) else float(found.pvalue)
