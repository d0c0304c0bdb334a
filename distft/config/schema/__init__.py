"""The closed, typed schema of a run: one dataclass a group, each knob's doc beneath it."""

from __future__ import annotations

from dataclasses import dataclass, field

from distft.config.schema.data import Data, Source
from distft.config.schema.knob import choice
from distft.config.schema.launch import Launch, Log, RunFolder
from distft.config.schema.model import Model, TinyShape
from distft.config.schema.objective import Objective
from distft.config.schema.optim import (
    Activation,
    Batch,
    Checkpoint,
    EarlyStopping,
    Evaluation,
    Guard,
    Optim,
    Schedule,
)
from distft.config.schema.strategy import Strategy
from distft.config.schema.sweep import Sweep
from distft.config.schema.tuning import Tuning
from distft.config.schema.verify import Verification


@dataclass
class Run:
    """Everything that decides what a run does."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    tuning: Tuning = field(default_factory=Tuning)
    objective: Objective = field(default_factory=Objective)
    strategy: Strategy = field(default_factory=Strategy)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    batch: Batch = field(default_factory=Batch)
    activation: Activation = field(default_factory=Activation)
    eval: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    guard: Guard = field(default_factory=Guard)
    verify: Verification = field(default_factory=Verification)
    launch: Launch = field(default_factory=Launch)
    log: Log = field(default_factory=Log)
    run: RunFolder = field(default_factory=RunFolder)
    sweep: Sweep = field(default_factory=Sweep)

    precision: str = choice("auto", "fp32", "bf16")
    """auto: bf16 on a GPU, fp32 on a CPU. Trained weights have an fp32 master either way."""

    epochs: float = 1.0
    """Passes over the training bins; not used when `max_steps` is given."""

    max_steps: int | None = None
    """Optimizer steps."""

    seed: int = 0
    """Decides data order, adapter initialisation and dropout."""

    resume: str = "auto"
    """auto: the newest good checkpoint in `run.dir`, if any; never; or a run folder or checkpoint."""

    resume_allow: list[str] = field(default_factory=list)
    """Knobs that may differ from the checkpoint's although they change what is computed."""


__all__ = [
    "Activation",
    "Batch",
    "Checkpoint",
    "Data",
    "EarlyStopping",
    "Evaluation",
    "Guard",
    "Launch",
    "Log",
    "Model",
    "Objective",
    "Optim",
    "Run",
    "RunFolder",
    "Schedule",
    "Source",
    "Strategy",
    "Sweep",
    "TinyShape",
    "Tuning",
    "Verification",
]
