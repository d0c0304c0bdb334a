"""Which numbers each knob takes."""

from __future__ import annotations

from collections.abc import Callable

Range = tuple[Callable[[float], bool], str]

COUNT: Range = (lambda value: value >= 1 and value == int(value), "a whole number from 1")
NATURAL: Range = (lambda value: value >= 0 and value == int(value), "a whole number from 0")
POSITIVE: Range = (lambda value: value > 0, "a number above 0")
NOT_NEGATIVE: Range = (lambda value: value >= 0, "a number from 0")
SHARE: Range = (lambda value: 0 <= value <= 1, "a share from 0 to 1")
SHARE_BELOW_ONE: Range = (lambda value: 0 <= value < 1, "a share from 0 to below 1")

RANGES: dict[str, Range] = {
    "model.tiny.hidden_size": COUNT,
    "model.tiny.num_layers": COUNT,
    "model.tiny.num_heads": COUNT,
    "model.tiny.num_kv_heads": COUNT,
    "model.tiny.intermediate_size": COUNT,
    "model.tiny.vocab_size": (lambda value: value >= 300, "a whole number from 300 (256 bytes and the special tokens)"),
    "data.eval_fraction": SHARE_BELOW_ONE,
    "data.sequence_length": (lambda value: value >= 2, "a whole number from 2"),
    "data.max_rejected": SHARE,
    "data.max_row_bytes": COUNT,
    "tuning.lora_rank": COUNT,
    "tuning.lora_alpha": POSITIVE,
    "tuning.lora_dropout": SHARE_BELOW_ONE,
    "optim.lr": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.eps": POSITIVE,
    "optim.clip": NOT_NEGATIVE,
    "schedule.warmup": NOT_NEGATIVE,
    "schedule.final": SHARE,
    "schedule.decay": SHARE,
    "batch.global_size": COUNT,
    "batch.micro_size": COUNT,
    "batch.pass_tokens": COUNT,
    "activation.budget": POSITIVE,
    "eval.every": NATURAL,
    "eval.samples": NATURAL,
    "eval.max_new_tokens": COUNT,
    "checkpoint.every": NATURAL,
    "checkpoint.keep": COUNT,
    "early_stopping.patience": NATURAL,
    "guard.patience": COUNT,
    "guard.spike_score": POSITIVE,
    "guard.spike_window": (lambda value: value >= 4 and value == int(value), "a whole number from 4"),
    "guard.max_rollbacks": COUNT,
    "guard.stall_seconds": POSITIVE,
    "verify.max_memory": POSITIVE,
    "launch.ranks": COUNT,
    "launch.start_timeout": POSITIVE,
    "launch.ssh_port": COUNT,
    "launch.max_restarts": NATURAL,
    "launch.min_ranks": COUNT,
    "launch.restart_seconds": NOT_NEGATIVE,
    "launch.nodes": COUNT,
    "launch.gpus_per_node": COUNT,
    "launch.cpus_per_rank": COUNT,
    "launch.signal_seconds": COUNT,
    "log.every": COUNT,
    "sweep.jobs": (COUNT[0], "auto or a whole number from 1"),
    "sweep.trials": COUNT,
    "sweep.seed": NATURAL,
    "sweep.prune_after_trials": NATURAL,
    "sweep.prune_after_steps": NATURAL,
    "epochs": POSITIVE,
    "max_steps": COUNT,
    "seed": NATURAL,
}

AUTO = ("sweep.jobs",)
"""Numbers that may also be `auto`, though it is not their default."""
