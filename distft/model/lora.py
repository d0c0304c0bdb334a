"""Frozen linear layers with low-rank adapters (Hu et al. 2021, arXiv:2106.09685), several at once on the same input.

    output_i = x W_i^T + bias_i + scale_i (x A_i^T) B_i^T

One operator forward and one node of the autograd graph: x is kept once, the A's of all layers are one matrix product,
sums are made in place, and the frozen W_i get no gradients. Everything is computed in the type of x: adapters of
another type are cast, never activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# An operator of its own, so that selective checkpointing sees one call whose results it may keep: of the products
# inside, it would keep every partial sum, and not allow the next to be added in place.
_library = torch.library.Library("distft", "FRAGMENT")
_library.define(
    "adapted_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor a, Tensor[] b, float[] scales) -> Tensor[]"
)


def _adapted_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Tensor,
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    low = rows @ a.t()
    outputs = []
    parts = low.split([part.shape[1] for part in b], dim=1)
    for weight, bias, part, up, scale in zip(weights, biases, parts, b, scales, strict=True):
        output = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        output.addmm_(part, up.t(), alpha=scale)
        outputs.append(output.view(*x.shape[:-1], weight.shape[0]))
    return [low, *outputs]


for _key in ("CPU", "CUDA"):
    _library.impl("adapted_linear", _adapted_linear, _key)
torch.library.register_fake("distft::adapted_linear", _adapted_linear, lib=_library)


class Copies(NamedTuple):
    """Adapters in the type of x."""

    a: Tensor  # all A's, one below the other: [sum of lora ranks, in]
    b: list[Tensor]  # [out_i, lora_rank_i] each


def stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A's, one below the other: [sum of lora ranks, in]."""
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype)


def copied(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> Copies:
    """Made for one call; what is of `dtype` already stays itself."""
    return Copies(stacked(a, dtype), [up.to(dtype) for up in b])


def adapted_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    copies: Copies | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [..., out_i] of all layers on x [..., in].

    weights: [out_i, in] each and biases [out_i] or None, frozen, of the type of x. a: [lora_rank_i, in] each and b:
    [out_i, lora_rank_i], of any floating type; their gradients have that type. copies: of a and b, where the caller
    keeps them; they must stay as they are until the backward pass, as a and b must.
    """
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = AdaptedLinear.apply(x, tuple(scales), copies, *weights, *biases, *a, *b)
        return outputs
    return tuple(torch.ops.distft.adapted_linear(x, weights, biases, *(copies or copied(a, b, x.dtype)), scales)[1:])


class AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], copies: Copies | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = quarters(tensors)
        low, *outputs = torch.ops.distft.adapted_linear(x, weights, biases, *(copies or copied(a, b, x.dtype)), scales)
        # Parameters themselves and no views or casts of them: an engine may free their memory until the backward pass.
        adapters = (*a, *b) if copies is None else (copies.a, *copies.b)
        ctx.save_for_backward(x, low, *weights, *adapters)
        ctx.scales, ctx.copied = scales, copies is not None
        ctx.dtypes = [(down.dtype, up.dtype) for down, up in zip(a, b, strict=True)]
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, low, *tensors = ctx.saved_tensors
        count = len(ctx.scales)
        weights, adapters, b = tensors[:count], tensors[count:-count], tensors[-count:]
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        a_gradients: list[Tensor | None] = [None] * count
        b_gradients: list[Tensor | None] = [None] * count
        x_gradient = None
        if not used:
            return (None, None, None, *[None] * 4 * count)
        rows = x.reshape(-1, x.shape[-1])
        flat = {index: gradients[index].reshape(rows.shape[0], -1) for index in used}  # type: ignore[union-attr]
        ranks = [up.shape[1] for up in b]
        parts = low.split(ranks, dim=1)
        together = x.new_empty(rows.shape[0], sum(ranks[index] for index in used))
        inner = together.split([ranks[index] for index in used], dim=1)  # gradients of x A_i^T
        for index, of_low in zip(used, inner, strict=True):
            scale, (_, dtype) = ctx.scales[index], ctx.dtypes[index]
            of_low.addmm_(flat[index], b[index].to(x.dtype), beta=0, alpha=scale)
            b_gradients[index] = product(flat[index].t(), parts[index], scale, dtype)
        of_a = product(together.t(), rows, 1.0, ctx.dtypes[0][0]).split([ranks[index] for index in used])
        for index, gradient in zip(used, of_a, strict=True):
            a_gradients[index] = gradient.to(ctx.dtypes[index][0])
        if ctx.needs_input_grad[0]:
            downs = adapters[0].split(ranks) if ctx.copied else adapters
            whole = ctx.copied and len(used) == count
            total = together @ (adapters[0] if whole else stacked([downs[index] for index in used], x.dtype))
            for index in used:
                total.addmm_(flat[index], weights[index])
            x_gradient = total.view(x.shape)
        return (x_gradient, None, None, *[None] * 2 * count, *a_gradients, *b_gradients)


def product(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * left @ right in `dtype`, [m, n]: on CUDA summed and written in it by the product itself."""
    shape = left.shape[0], right.shape[1]
    if dtype != left.dtype and left.device.type == "cuda" and torch.version.hip is None:
        out = torch.empty(shape, dtype=dtype, device=left.device)
        return torch.addmm(out, left, right, beta=0, alpha=scale, out_dtype=dtype, out=out)
    return left.new_empty(shape).addmm_(left, right, beta=0, alpha=scale).to(dtype)


def quarters(tensors: Sequence[Any]) -> tuple[list[Any], ...]:
    count = len(tensors) // 4
    return tuple(list(tensors[start : start + count]) for start in range(0, 4 * count, count))
