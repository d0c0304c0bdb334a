from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema.knob import choice

ZERO = ("zero1", "zero2", "zero3", "zero3_offload")


@dataclass
class Strategy:
    name: str = choice("zero2", "ddp", "zero1", "zero3", "zero3_offload", "fsdp", "hsdp")
    """How parameters, gradients and moments are laid over the ranks."""

    shard_size: Any = "auto"
    """hsdp: ranks that share one copy of the model; auto: the ranks of one node."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Handed to DeepSpeed as it is (zero1, zero2, zero3, zero3_offload). Keys that distft owns are refused."""
