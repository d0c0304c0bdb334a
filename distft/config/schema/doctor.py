from __future__ import annotations

from dataclasses import dataclass, field

from distft.config.schema import Run

CHECKS = ("versions", "devices", "kernels", "limits", "programs", "disk", "links", "clock", "tracker", "hub")


@dataclass
class Doctor:
    """What `distft doctor` looks at, and what it counts as slow."""

    checks: list[str] = field(default_factory=lambda: list(CHECKS))
    """What is looked at: versions, devices, kernels, limits, programs, disk, links, clock, tracker (W&B), hub."""

    seconds: float = 60.0
    """A check that takes longer has failed; of the kernels, each one."""

    link_seconds: float = 0.5
    """Time for measuring one pair of ranks."""

    slow_link: float = 3.0
    """A pair of ranks is slow if it moves this many times less than the quicker pairs of its kind."""

    min_bandwidth: float | None = None
    """GB/s that every pair of ranks has to move, else the verdict is `fails`. Without it a slow pair is a warning."""

    output: str | None = None
    """File for the verdicts as JSON."""


@dataclass
class DoctoredRun(Run):
    """A run as `distft train` takes it, and how the machines for it are looked at."""

    doctor: Doctor = field(default_factory=Doctor)
