"""What an engine wraps: model and objective together, so that its hooks see one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distft.data.batch import Batch


@dataclass(frozen=True)
class LossRequest:
    """Ask for the loss of one micro-batch."""

    batch: Batch
    scale: float  # 1 / supervised tokens of the global batch: multiplies the summed loss
    share: float = 1.0  # this micro-batch's real tokens / those of the global batch: weighs the MoE auxiliary loss
    num_sources: int = 1


@dataclass(frozen=True)
class LogitsRequest:
    """Ask for full logits at a few positions (decoding, checks)."""

    input_ids: Tensor  # [rows, length]
    position_ids: Tensor  # [rows, length]
    attention_mask: Tensor | None  # [rows, length] bool; None: every position is real
    positions: Tensor  # [n] flat index, row * length + column


@dataclass(frozen=True)
class LossSums:
    """Answer to a loss request."""

    loss: Tensor  # scalar fp32 with a gradient: scale * sum(NLL) + share * auxiliary loss
    nll: Tensor  # [num_sources] fp32, detached sums of NLL by source
    counts: Tensor  # [num_sources] fp32, supervised tokens by source
    auxiliary: Tensor  # scalar fp32, detached, already weighted by share; 0 without one


class Trainee(nn.Module):
    """Model and loss in one module.

    `model` keeps its names: a parameter of the trainee is called `model.<name in the Hugging Face or PEFT model>`.
    The head's own `forward` is replaced on this instance by the chunked loss (see distft.model.loss), because only a
    call of the head module fires the engines' gather hooks on its weight.
    """

    def __init__(self, model: nn.Module, vocab_chunk: int = 512) -> None: ...
