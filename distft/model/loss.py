"""The head and its cross-entropy in one pass, chunk by chunk, so that logits of all tokens never exist.

For every chunk of supervised positions the logits are made, the loss and the gradients of hidden states and head
weights are taken from them at once, in the forward pass, and the logits are dropped (the idea of Liger-Kernel's fused
linear cross-entropy, Hsu et al. 2024, and of Cut Cross-Entropy, Wijmans et al. 2025). The largest temporaries are
[chunk, vocabulary] in fp32; besides them the head's gradient exists once, in fp32 while it is summed. The arithmetic
itself, in more than one way, is in distft.model.cross_entropy.

The head keeps its module and its name. Only this instance's `forward` learns to answer a `HeadRequest`, because only a
call of the module fires the engines' gather hooks: outside, ZeRO-3's weight is empty and FSDP2's is a DTensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.model.cross_entropy import WAYS, Room, Sums
from distft.model.lookup import gradient_of


@dataclass(frozen=True)
class Tail:
    """What a model does to its logits behind the head: multiply by `scale`, then cap (cap * tanh(logits / cap))."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply to fp32 logits, in place where nothing else needs them."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def tail_of(config: Any) -> Tail:
    """Read the tail from a model's configuration; `head.check_head` tells whether that is all the model does."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere; Falcon-H1; Muse
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
    caps = (getattr(text, name, None) for name in names)
    return Tail(scale, next((cap for cap in caps if cap), None))


class HeadRequest(NamedTuple):
    """What the head is asked for besides hidden states at the asked positions, [positions, dim]."""

    tail: Tail
    targets: Tensor | None  # [positions] int64: the loss is wanted; None: fp32 logits [positions, vocabulary]
    chunk: int  # positions whose logits exist at a time
    way: str = "chunked"  # of distft.model.cross_entropy
    by_position: bool = True  # whether the NLL of every position is wanted, or only their sum
    factor: float | None = None  # see `sums_of`
    room: Room | None = None  # for logits on a CPU; None: new memory for every call


class ChunkedLoss(torch.autograd.Function):
    """sum(NLL) over positions, with gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        request: HeadRequest,
        needs: tuple[bool, ...],
        sums: Sums | None,
    ) -> tuple[Tensor, Tensor]:
        """hidden: [positions, dim]; weight: [vocabulary, dim]; needs: gradients wanted of hidden, weight and bias;
        sums: where those of weight and bias are added at once, in place of being handed to autograd.

        Returns the sum, scalar fp32, and the NLL of each position, [positions] fp32 (without a gradient; anything of
        the same sum where `request.by_position` is off). Matrix products run in the dtype of autocast if that is on,
        else of the weight; softmax and sums run in fp32.
        """
        dtype = compute_dtype(weight)
        way = WAYS[request.way if any(needs) else "chunked"]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            nll, ctx.gradients = way(hidden.to(dtype), weight.to(dtype), bias, request, needs, sums)
            total = nll.sum()
            # NaN where the loss is not finite, so that every rank sees a norm that is not finite
            ctx.poison = total * 0
            for added in () if sums is None else (sums.weight, sums.bias):
                if added is not None:
                    added.view(-1)[:1].add_(ctx.poison)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The gradients of the chunked loss were used up by the first backward pass.")
        factor = grad_total + ctx.poison
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *scaled, None, None, None


def compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def head_forward(head: nn.Linear, hidden: Tensor, request: HeadRequest | None = None) -> Any:
    """What replaces `forward` of a head instance.

    Without a request: plain logits. With targets: (sum of NLL, NLL of each position). Without targets: fp32 logits with
    the tail applied.
    """
    if request is None or request.targets is None:
        logits = F.linear(hidden, head.weight, head.bias)
        return logits if request is None else request.tail(logits.float())
    needs = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, head.weight, head.bias)
    )
    return ChunkedLoss.apply(hidden, head.weight, head.bias, request, needs, sums_of(head, request, needs))


def sums_of(head: nn.Linear, request: HeadRequest, needs: tuple[bool, ...]) -> Sums | None:
    """Where the head's own gradients are added in the forward pass: to its parameters' `.grad`, if a factor is given.

    A promise of whoever gives one: the sum will be multiplied by `factor`, one backward pass will follow, and nothing
    waits to be handed these gradients. What it saves: a second tensor of the head's size at the moment when
    activations are most, and three passes over it.
    """
    _, of_weight, of_bias = needs
    if request.factor is None or request.way == "torch" or not (of_weight or of_bias):
        return None
    if any(parameter.dtype != torch.float32 for parameter in head.parameters()):
        return None
    return Sums(
        gradient_of(head.weight) if of_weight else None, gradient_of(head.bias) if of_bias else None, request.factor
    )
