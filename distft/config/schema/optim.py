from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.config.schema.knob import choice


@dataclass
class Optim:
    name: str = choice("adamw", "sgd")
    """adamw: Loshchilov & Hutter 2019. sgd: plain, without momentum (for proofs)."""

    lr: float = 2e-4
    """Peak learning rate."""

    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: norms, biases and other vectors are left alone."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""

    eps: float = 1e-8
    """AdamW's denominator offset."""

    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass
class Schedule:
    name: str = choice("cosine", "linear", "constant", "wsd")
    """Shape of the learning rate after warm-up; wsd: warm-up, stable, decay."""

    warmup: float = 0.03
    """Below 1: a share of all steps; 1 or more: a number of steps."""

    final: float = 0.0
    """Learning rate at the end of the run as a share of `optim.lr` (cosine, linear, wsd)."""

    decay: float = 0.1
    """wsd: share of all steps in which the rate falls."""


@dataclass
class Batch:
    global_size: int = 8
    """Bins in one optimizer step, over all ranks."""

    micro_size: int = 1
    """Bins in one forward pass of one rank."""

    pass_tokens: int | None = None
    """Most tokens in one forward pass, padding counted: a micro-batch of more is taken in several passes, cut between
    documents. Same loss, less memory for activations. One document a row: rows of like length go together, so that
    little is padded. Not set: a micro-batch is one pass."""


@dataclass
class Activation:
    mode: str = choice("none", "selective", "full")
    """Gradient checkpointing: selective keeps matrix products and attention, full keeps only block inputs. With a
    budget it names how the chosen blocks are checkpointed; none then means selective, or full where that is too
    little."""

    budget: float | None = None
    """GiB a rank for what forward passes keep for backward ones (weights, gradients and optimizer not counted): the
    fewest blocks that make the largest micro-batch fit are checkpointed. Not set: every block, as `mode` says."""


@dataclass
class Evaluation:
    every: int = 0
    """Steps between evaluations; 0: only at the end."""

    at_start: bool = True
    """Evaluate before the first step."""

    samples: int = 3
    """Answers sampled at the last evaluation and logged as a table; 0: none."""

    max_new_tokens: int = 64
    """Longest sampled answer."""


@dataclass
class Checkpoint:
    every: int = 0
    """Steps between checkpoints; 0: only at the end."""

    keep: int = 2
    """Newest checkpoints that stay on disk; the best one stays too."""

    best: str = "eval/loss"
    """Metric that names the best checkpoint."""

    mode: str = choice("min", "max")
    """Whether a smaller or a larger value of `checkpoint.best` is better."""

    background: Any = choice("auto", True, False)  # noqa: RUF009 (a field, seen through `Any`)
    """Write behind training, from a copy in host memory (12 bytes a trained parameter under AdamW, divided by the
    ranks; kept between checkpoints). auto: where the copies take at most half of the host memory left, else training
    waits for the disk."""

    on_full: str = choice("stop", "skip")
    """Where a checkpoint does not fit on the disk. stop: end the run, with the cure. skip: say so, go on without it and
    try again at the next; the one that a signal asks for is never skipped."""


@dataclass
class EarlyStopping:
    patience: int = 0
    """Evaluations without a better `checkpoint.best` after which the run ends; 0: off."""


@dataclass
class Guard:
    patience: int = 5
    """Steps in a row without an update, because loss or gradient norm were not finite or (spike=skip) the loss spiked,
    after which the run stops."""

    spike: str = choice("none", "warn", "skip", "rollback")
    """What follows a loss far above those of the steps before. warn: a line; skip: no rank makes that step's update;
    rollback: back to the last checkpoint, and on without that step's global batch. All reduce one number more a
    step."""

    spike_score: float = 6.0
    """Robust z-score from which a loss is a spike: its distance from the median of the steps before in standard
    deviations (1.4826 times the median absolute deviation, at least 1 % of the median)."""

    spike_window: int = 32
    """Steps that a loss is compared with; until there are so many none is judged."""

    max_rollbacks: int = 3
    """Rollbacks to the same checkpoint; the run stops where one more would follow."""

    stall_seconds: float = 600.0
    """Seconds in which every rank has to move: through a micro-batch, to its next batch of data, past a tensor of a
    checkpoint. A rank that does not is named, and the run ends with code 5. Until the first step is done, and while
    the tracker closes, `launch.start_timeout` holds where it is longer."""
