"""In which types each engine computes, known before it is made."""

from __future__ import annotations

import torch
from torch import nn

from distft.config.schema.strategy import ZERO
from distft.model.footprint import Numbers


def numbers_of(strategy: str, precision: str, model: nn.Module) -> Numbers:
    """What `strategy` makes of `model`, whose `requires_grad` is settled: see its `prepare`."""
    if precision == "fp32":
        return Numbers(torch.float32, torch.float32, autocast=False)
    full = all(parameter.requires_grad for parameter in model.parameters())
    if strategy in ("fsdp", "hsdp") or (strategy in ZERO and full):
        return Numbers(torch.bfloat16, torch.bfloat16, autocast=False)
    return Numbers(torch.float32, torch.bfloat16, autocast=True)
