from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.config.schema.knob import choice


@dataclass
class Tuning:
    method: str = choice("full", "lora")
    """full: every weight is trained. lora: low-rank adapters (PEFT), the base stays frozen."""

    lora_rank: int = 16
    """Rank of the adapters."""

    lora_alpha: float = 32
    """Scale: the adapter's output is multiplied by alpha / rank (rsLoRA: alpha / sqrt(rank))."""

    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""

    target: Any = "all-linear"
    """all-linear (every linear layer but the head), a list of module names, or one regular expression."""

    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""

    dora: bool = False
    """Weight-decomposed adapters (Liu et al. 2024)."""
