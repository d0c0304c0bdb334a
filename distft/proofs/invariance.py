"""Loss invariance: the same documents give the same loss and gradients, however a step is divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distft.proofs.outcome import Outcome, failed
from distft.proofs.trial import Trial

BOUNDS = {
    "fp32": (("{} steps", slice(None), 1e-5),),
    "bf16": (("the first step", slice(1), 1e-3), ("the steps behind it", slice(1, None), 0.1)),
}
"""By precision: which steps, and the largest relative difference of their loss or gradient norm.

bf16 keeps 8 bits, 0.4 % a rounding. Of the weights that all begin with, sums of many roundings agree to 1e-4, and a
mean of means is 4e-3 away or more; each update then rounds otherwise, and a few of them make percents of that.
"""

Records = Sequence[Mapping[str, Any]]


def prove(trials: Sequence[Trial], failures: Mapping[str, str], precision: str) -> Outcome:
    """Compare every step of all trials with the first one's. They differ in ranks, micro-batch and accumulation."""
    parts = BOUNDS[precision]
    compared = "loss and gradient norm, ranks x micro-batch x accumulation " + ", ".join(t.split for t in trials)
    reasons = [failures[trial.folder.name] for trial in trials if failures[trial.folder.name]]
    if reasons:
        return failed("invariance", compared, reasons[0], parts[0][2])
    first = trials[0].records()
    found = []
    for trial in trials[1:]:
        for steps, part, bound in parts:
            if first[part] or not first:
                value, where = apart(first[part], trial.records()[part])
                found.append((value / bound, value, bound, f"{trial.split}: {where}", steps.format(len(first))))
    share, value, bound, where, steps = max(found)
    seen = f"{value:.1e} apart" + (f" ({where})" if share > 1 else f" in {steps}")
    return Outcome("invariance", compared, seen, value, bound, passed=share <= 1)


def apart(one: Records, other: Records) -> tuple[float, str]:
    """Largest relative difference of two runs' losses and gradient norms, and where it is; infinite where they did not
    see the same tokens or a number is not finite."""
    if not one or len(one) != len(other):
        return float("inf"), f"{len(one)} steps and {len(other)}"
    worst, where = 0.0, ""
    for mine, theirs in zip(one, other, strict=True):
        for name in ("step", "tokens", "supervised_tokens"):
            if mine[name] != theirs[name]:
                return float("inf"), f"{name} of step {mine['step']}: {mine[name]} and {theirs[name]}"
        for name in ("loss", "grad_norm"):
            value, wanted = float(theirs[name]), float(mine[name])
            difference = abs(value - wanted) / max(abs(wanted), 1e-12)
            if not difference <= worst:
                worst = difference if difference == difference else float("inf")
                where = f"{name} of step {mine['step']}: {wanted:.6g} and {value:.6g}"
    return worst, where
