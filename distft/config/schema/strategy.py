from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema.knob import choice

ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
FSDP = ("fsdp", "hsdp")


@dataclass
class Strategy:
    name: str = choice("zero2", "ddp", "zero1", "zero3", "zero3_offload", "fsdp", "hsdp")
    """How parameters, gradients and moments are laid over the ranks."""

    shard_size: Any = "auto"
    """hsdp: ranks that share one copy of the model; auto: the ranks of one node."""

    reshard_after_forward: Any = "auto"
    """fsdp, hsdp: whether weights gathered for a forward pass are dropped behind it and gathered again for backward.
    auto: those of every block but the last; true: of every block; false: of none, and they stay until the step's last
    backward pass (the least traffic); a number: kept in shards among so many neighbouring ranks."""

    gradient_sync: str = choice("last", "each")
    """fsdp, hsdp, steps of several micro-batches. last: every rank sums whole gradients in fp32, which are reduced once
    a step; each: reduced behind every micro-batch, so that a rank holds its rows only."""

    communication: str = choice("fp32", "bf16")
    """In what gradients travel between ranks. bf16 halves the bytes and rounds them; sums on a rank, the master and the
    update stay fp32."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Handed to DeepSpeed as it is (zero1, zero2, zero3, zero3_offload). Keys that distft owns are refused."""
