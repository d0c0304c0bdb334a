"""RMSNorm and gated products in plain torch, keeping their inputs alone for the backward pass.

A model's own code makes several tensors in each of these layers, and autograd keeps them: the normalised states beside
the states, act(gate) beside gate and up. Here the backward pass makes them again from the inputs, element by element,
which costs nothing beside the matrix products around it. liger-kernel (Hsu et al. 2024) does the same on CUDA in one
kernel each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Normed(torch.autograd.Function):
    """RMSNorm (Zhang & Sennrich 2019) with a weight. Kept: the input, the weight, one number a position."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        """states: [..., size]; weight: [size]. `offset` is added to the weight. `casting`: `llama` multiplies by the
        weight in the dtype of the states, `gemma` in fp32."""
        wide = states.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = wide * inverse
        ctx.save_for_backward(states, weight, inverse)
        ctx.offset = offset
        if casting == "gemma":
            return normed.mul_(weight.float() + offset).to(states.dtype)
        factor = weight + offset if offset else weight
        normed = normed.to(states.dtype)
        return normed.mul_(factor) if normed.dtype == factor.dtype else normed * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, inverse = ctx.saved_tensors
        gradient = gradient.float()
        normed = states.float() * inverse
        for_states = for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (gradient * normed).sum(tuple(range(gradient.ndim - 1))).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            slope = gradient * (weight.float() + ctx.offset)
            along = (slope * normed).mean(-1, keepdim=True)
            for_states = slope.sub_(normed.mul_(along)).mul_(inverse).to(states.dtype)
        return for_states, for_weight, None, None, None


class Gated(torch.autograd.Function):
    """act(gate) * up (Shazeer 2020). Kept: gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        """gate, up: [..., size]. act: `silu`, or `gelu` in its approximation by tanh."""
        ctx.save_for_backward(gate, up)
        ctx.act = act
        active = activated(gate, act)
        return active.mul_(up) if active.dtype == up.dtype else active * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        for_gate = for_up = None
        if ctx.needs_input_grad[1]:
            active = activated(gate, ctx.act)
            for_up = active.mul_(gradient) if active.dtype == gradient.dtype else gradient * active
        if ctx.needs_input_grad[0]:
            of_active = (gradient * up).to(gate.dtype)
            if ctx.act == "silu":
                for_gate = torch.ops.aten.silu_backward(of_active, gate)
            else:
                for_gate = torch.ops.aten.gelu_backward(of_active, gate, approximate="tanh")
        return for_gate, None if for_up is None else for_up.to(up.dtype), None


def activated(gate: Tensor, act: str) -> Tensor:
    return F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
