"""distft's sweeper and launcher as choices of Hydra's, and the words of other sweepers with what distft says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

PLUGINS = "hydra_plugins.hydra_distft"


@dataclass
class OptunaSettings:
    """Nothing: what it does stands in the section `sweep`."""

    _target_: str = f"{PLUGINS}.OptunaSweeper"


@dataclass
class SideBySideSettings:
    _target_: str = f"{PLUGINS}.SideBySide"

    flags: list[str] = field(default_factory=list)
    """--config-name and --config-dir of the command line, for the jobs' own."""


def register() -> None:
    """Let `hydra/sweeper=optuna` and `hydra/launcher=side_by_side` be chosen (sweep/plugins.py brings what they do)."""
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="optuna", node=OptunaSettings, provider="distft")
    store.store(group="hydra/launcher", name="side_by_side", node=SideBySideSettings, provider="distft")


OURS = {
    "n_trials": "sweep.trials",
    "n_jobs": "sweep.jobs",
    "direction": "checkpoint.mode=min|max, for checkpoint.best",
    "sampler": "sweep.sampler",
    "seed": "sweep.seed",
    "pruner": "sweep.pruner",
    "params": "sweep.space, or the command line itself",
    "search_space": "sweep.space, or the command line itself",
    "storage": "hydra.sweep.dir, the folder in which the study lies",
    "study_name": "hydra.sweep.dir, the folder in which the study lies",
    "max_batch_size": "sweep.jobs",
}
"""By the settings of hydra-optuna-sweeper and Hydra's basic sweeper, which Hydra users may have in their fingers."""


def problems(overrides: Sequence[Override]) -> Iterator[str]:
    for override in overrides:
        name = override.key_or_group.replace("/", ".")
        if not name.startswith("hydra.sweeper."):
            continue
        word = name.split(".")[2]
        cure = f"Say {OURS[word]}." if word in OURS else "What it does stands in the section sweep: see --help."
        yield f"`{override.input_line}`: distft's sweeps have no such setting. {cure}"
