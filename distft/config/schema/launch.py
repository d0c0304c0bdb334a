from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema.knob import choice


@dataclass
class Launch:
    target: str = choice("local")
    """Where the workers run: local: on this machine."""

    ranks: Any = "auto"
    """Worker processes; auto: one a GPU, or one where there is none."""

    engine: str = choice("direct", "deepspeed", "torchrun")
    """Who starts the workers. direct: distft itself, which keeps exit codes and forwards signals."""

    dry_run: bool = False
    """Print the exact commands and stop."""

    start_timeout: float = 600.0
    """Seconds in which preflight has to end and every rank has to arrive."""


@dataclass
class Log:
    tracker: str = choice("wandb", "tensorboard", "none")
    """Besides metrics.jsonl and the progress bar. wandb without a key writes offline runs."""

    every: int = 10
    """Steps between training records; the first and the last step always."""

    project: str = "distft"
    """W&B project."""

    group: str | None = None
    """W&B group; default: the sweep's name in a sweep."""

    tags: list[str] = field(default_factory=list)
    """W&B tags."""


@dataclass
class RunFolder:
    name: str | None = None
    """Default: the data's name."""

    dir: str | None = None
    """Default: runs/<name>-<time>."""
