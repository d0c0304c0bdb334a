from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema import Run
from distft.config.schema.knob import choice

PROOFS = ("packing", "invariance", "resume", "reload")


@dataclass
class Check:
    """How `distft check` tries a run."""

    proofs: list[str] = field(default_factory=lambda: list(PROOFS))
    """Which proofs are made: packing, invariance, resume, reload."""

    full: Any = choice("auto", True, False)  # noqa: RUF009 (a field, seen through `Any`)
    """true: the run's own model. false: a copy with two layers, narrow, with random weights and the same vocabulary.
    auto: the model itself up to 60 million parameters, else such a copy."""

    steps: int = 6
    """Optimizer steps of a whole trial; the resumed one begins after half of them."""

    sequence_length: int = 256
    """Positions of a bin in the trials, at most `data.sequence_length`."""

    output: str | None = None
    """File for the result as JSON. Default: check.json in the folder of `run=`, none without it."""


@dataclass
class CheckedRun(Run):
    """A run as `distft train` takes it, and how it is checked."""

    check: Check = field(default_factory=Check)
