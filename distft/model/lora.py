"""Frozen linear layers with low-rank adapters (Hu et al. 2021, arXiv:2106.09685), several at once on the same input.

    output_i = x W_i^T + bias_i + scale_i (x A_i^T) B_i^T

One operator forward and one node of the autograd graph: x is kept once, the A's of all layers are one matrix product,
sums are made in place, and the frozen W_i get no gradients. Everything is computed in the type of x: adapters of
another type are cast, never activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# An operator of its own, so that selective checkpointing sees one call whose results it may keep: of the products
# inside, it would keep every partial sum, and not allow the next to be added in place.
_library = torch.library.Library("distft", "FRAGMENT")
_library.define(
    "adapted_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, float[] scales) -> Tensor[]"
)


def _adapted_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    low = rows @ stacked(a, x.dtype).t()
    outputs = []
    parts = low.split([part.shape[0] for part in a], dim=1)
    for weight, bias, part, up, scale in zip(weights, biases, parts, b, scales, strict=True):
        output = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        output.addmm_(part, up.to(x.dtype).t(), alpha=scale)
        outputs.append(output.view(*x.shape[:-1], weight.shape[0]))
    return [low, *outputs]


for _key in ("CPU", "CUDA"):
    _library.impl("adapted_linear", _adapted_linear, _key)
torch.library.register_fake("distft::adapted_linear", _adapted_linear, lib=_library)


def stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A's, one below the other: [sum of lora ranks, in]."""
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype)


def adapted_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """The outputs [..., out_i] of all layers on x [..., in].

    weights: [out_i, in] each and biases [out_i] or None, frozen, of the type of x. a: [lora_rank_i, in] each and b:
    [out_i, lora_rank_i], of any floating type; their gradients have that type.
    """
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = AdaptedLinear.apply(x, tuple(scales), *weights, *biases, *a, *b)
        return outputs
    return tuple(torch.ops.distft.adapted_linear(x, weights, biases, a, b, scales)[1:])


class AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, a, b = quarters(tensors)
        low, *outputs = torch.ops.distft.adapted_linear(x, weights, biases, a, b, scales)
        # Parameters themselves and no views or casts of them: an engine may free their memory until the backward pass.
        ctx.save_for_backward(x, low, *weights, *a, *b)
        ctx.scales = scales
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, low, *tensors = ctx.saved_tensors
        count = len(ctx.scales)
        weights, a, b = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        rows = x.reshape(-1, x.shape[-1])
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        a_gradients: list[Tensor | None] = [None] * count
        b_gradients: list[Tensor | None] = [None] * count
        x_gradient = None
        if not used:
            return (None, None, *[None] * 4 * count)
        flat = {index: gradients[index].reshape(rows.shape[0], -1) for index in used}  # type: ignore[union-attr]
        parts = low.split([part.shape[0] for part in a], dim=1)
        inner = []  # gradients of x A_i^T, [rows, lora_rank_i]
        for index in used:
            scale = ctx.scales[index]
            inner.append(flat[index] @ (b[index] * scale).to(x.dtype))
            b_gradients[index] = (flat[index].t() @ parts[index]).mul_(scale).to(b[index].dtype)
        together = inner[0] if len(inner) == 1 else torch.cat(inner, dim=1)
        of_a = (together.t() @ rows).split([a[index].shape[0] for index in used])
        for index, gradient in zip(used, of_a, strict=True):
            a_gradients[index] = gradient.to(a[index].dtype)
        if ctx.needs_input_grad[0]:
            total = together @ stacked([a[index] for index in used], x.dtype)
            for index in used:
                total.addmm_(flat[index], weights[index])
            x_gradient = total.view(x.shape)
        return (x_gradient, None, *[None] * 2 * count, *a_gradients, *b_gradients)


def quarters(tensors: Sequence[Any]) -> tuple[list[Any], ...]:
    count = len(tensors) // 4
    return tuple(list(tensors[start : start + count]) for start in range(0, 4 * count, count))
