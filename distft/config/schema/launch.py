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

    max_restarts: int = 0
    """How often the ranks are started again, from the last sound checkpoint, after a crash or a stall."""

    min_ranks: int | None = None
    """How few ranks may go on where not all can be started again; default: all are needed."""

    restart_seconds: float = 1.0
    """Wait before the first restart; each further one waits twice as long, up to a minute."""

    deadline: Any = "auto"
    """When all ranks save and end: seconds or [days-]HH:MM:SS from the start, or a time such as 2030-01-31T18:00;
    Slurm's end of the job where that is earlier. auto: Slurm's alone; none: neither."""

    requeue: Any = choice("auto", True, False)  # noqa: RUF009
    """Whether a Slurm job goes back into the queue once its run was stopped and saved. auto: where Slurm asked for it
    (SIGUSR1, its end of the job); true: also after SIGTERM and launch.deadline, which may be a person's wish."""

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
