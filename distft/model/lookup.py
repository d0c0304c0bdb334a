"""Word embeddings whose gradient goes straight to where gradients are summed.

Autograd makes a dense gradient of the whole table for the few rows that a pass has read, and adds it up; where the
table is also the head's weight, the head's gradient waits for it through the whole backward pass. Here the rows are
added to `weight.grad` itself. An engine that reduces gradients counts on being handed them, so this is for one that
has nothing to reduce.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def enable(model: Any) -> bool:
    """Let the input embeddings of a model do so, if they are trained and plain. Returns whether they do."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or not table.weight.requires_grad:
        return False
    if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return False
    anchor = torch.zeros((), requires_grad=True, device=table.weight.device)

    def forward(self: nn.Embedding, ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.embedding(ids, self.weight)
        rows: Tensor = Rows.apply(anchor, ids, self)
        return rows

    table.forward = types.MethodType(forward, table)  # type: ignore[method-assign]
    return True


class Rows(torch.autograd.Function):
    """The rows of a table. The table is no input, or its summed gradient would wait for this backward pass."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, table: nn.Embedding) -> Tensor:
        """anchor: scalar that requires a gradient and gets none; ids: [...] int64. Returns [..., size]."""
        ctx.save_for_backward(ids)
        ctx.table = table
        return F.embedding(ids, table.weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        weight = ctx.table.weight
        ids, gradient = ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]).to(weight.dtype)
        if ctx.table.padding_idx is not None:
            gradient = gradient.masked_fill((ids == ctx.table.padding_idx)[:, None], 0)
        gradient_of(weight).index_put_((ids,), gradient, accumulate=True)  # in the same order every time, also on CUDA
        return None, None, None


def gradient_of(parameter: Tensor) -> Tensor:
    """What has been summed of its gradient so far, zeros at first: to be added to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
