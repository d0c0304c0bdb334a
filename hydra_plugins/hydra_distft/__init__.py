"""What Hydra may instantiate as a sweeper or a launcher has to lie in the package `hydra_plugins`: distft's own do."""

from __future__ import annotations

from distft.sweep import side_by_side, sweeper


class OptunaSweeper(sweeper.OptunaSweeper):
    """`hydra/sweeper=optuna`."""


class SideBySide(side_by_side.SideBySide):
    """`hydra/launcher=side_by_side`, which `sweep.jobs` chooses."""
