"""The arithmetic of the head's loss in three ways: NLL at each position and the gradients of their sum, made together.

All of them take hidden states and weight in the compute dtype, multiply in it, take the softmax in fp32 and never hold
more logits than a chunk's. `chunked` is plain torch and runs anywhere. `liger` has the part between the products done
by one kernel of liger-kernel (Hsu et al. 2024), in place. `torch` is `torch.nn.functional.linear_cross_entropy`.
distft.model.head_trial chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from distft.model.loss import HeadRequest, Tail

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden [positions, dim], weight [vocabulary, dim] and bias [vocabulary]; None where not wanted."""


class Room:
    """Memory for the logits of a chunk, kept from pass to pass: on a CPU new memory costs a page fault every 4 KiB.

    It is in use when activations are most, so that keeping it adds nothing to the peak of a step without checkpointing.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] on the CPU with anything in it. What an earlier call returned is the same memory."""
        if self.memory.dtype != dtype or self.memory.numel() < rows * columns:
            self.memory = torch.empty(rows * columns, dtype=dtype)
        return self.memory[: rows * columns].view(rows, columns)

    def release(self) -> None:
        """Until the next call of `take`."""
        self.memory = torch.empty(0)


class Sums(NamedTuple):
    """Where gradients of weight and bias are added up over passes, fp32; None where not wanted."""

    weight: Tensor | None  # [vocabulary, dim]
    bias: Tensor | None  # [vocabulary]
    factor: float  # what is added: gradients of the summed NLL times this


Way = Callable[
    [Tensor, Tensor, "Tensor | None", "HeadRequest", tuple[bool, ...], "Sums | None"], tuple[Tensor, Gradients]
]
"""(hidden, weight, bias, request, gradients wanted of those three, sums) -> (NLL, gradients of its sum).

NLL: [positions] fp32; or, where the request does not ask for it by position, any fp32 tensor with the same sum. With
`sums` the gradients of weight and bias are added there and None is returned in their place.
"""


def in_chunks(
    differentiate: Callable[[Tensor, Tensor, Tail, bool], tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: HeadRequest,
    needs: tuple[bool, ...],
    sums: Sums | None,
) -> tuple[Tensor, Gradients]:
    """A `Way` once it knows how to `differentiate` (see `softmax_gradient`). Gradients of weight and bias are summed in
    fp32."""
    targets, dtype = request.targets, weight.dtype
    assert targets is not None
    nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for_hidden = torch.empty_like(hidden) if needs[0] else None
    if sums is None:
        for_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
        for_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if needs[2] else None
        factor = 1.0
    else:
        for_weight, for_bias, factor = sums
    shape = min(request.chunk, len(hidden)), len(weight)
    if request.room is None or type(hidden) is not Tensor:  # a fake one only counts: its memory is none to keep
        room = torch.empty(shape, dtype=dtype, device=weight.device)
    else:
        room = request.room.take(*shape, dtype)

    for start in range(0, len(hidden), request.chunk):
        part = slice(start, start + request.chunk)
        logits = room[: len(hidden[part])]
        torch.mm(hidden[part], weight.T, out=logits)  # not F.linear, which DeepSpeed replaces during a pass
        if bias is not None:
            logits.add_(bias)
        nll[part], gradient = differentiate(logits, targets[part], request.tail, any(needs))
        if for_bias is not None:
            for_bias.add_(gradient.sum(dim=0, dtype=torch.float32), alpha=factor)
        low = gradient.to(dtype)
        if for_hidden is not None:
            torch.mm(low, weight, out=for_hidden[part])
        if for_weight is not None:
            add_product(for_weight, low, hidden[part], factor)
    return nll, (for_hidden, for_weight, for_bias) if sums is None else (for_hidden, None, None)


def softmax_gradient(logits: Tensor, targets: Tensor, tail: Tail, wanted: bool) -> tuple[Tensor, Tensor]:
    """NLL [positions] fp32 of a chunk's logits [positions, vocabulary], and the gradient of its sum by the logits.

    The memory of `logits` is used up. `wanted`: whether the gradient is; else what is returned in its place is of no
    use. The softmax is taken by rows in one call, which reads each row once from memory; the normaliser comes back from
    the largest probability, which is at least 1 / vocabulary.
    """
    target = targets[:, None]
    logits = tail(logits.float())
    of_target = logits.gather(1, target)
    largest = logits.amax(dim=1, keepdim=True)
    slope = None if tail.softcap is None or not wanted else 1 - (logits / tail.softcap).square_()
    # In place on a CPU, where new memory is dear and the kernel has read a value for the last time when it writes it.
    gradient = torch.softmax(logits, dim=1, out=logits if logits.device.type == "cpu" else None)
    nll = (largest - of_target - gradient.amax(dim=1, keepdim=True).log_()).squeeze(1)
    if wanted:
        gradient.scatter_add_(1, target, torch.full_like(of_target, -1))
        if slope is not None:
            gradient.mul_(slope)
        if tail.scale != 1.0:
            gradient.mul_(tail.scale)
    return nll, gradient


def liger_gradient(logits: Tensor, targets: Tensor, tail: Tail, wanted: bool) -> tuple[Tensor, Tensor]:
    """As `softmax_gradient`, by liger-kernel 0.8's kernel: logits become gradients where they lie, a row a program.

    Liger's own fused function counts targets on the host, which would wait for the device in every forward pass.
    """
    if tail.scale != 1.0:
        raise ValueError("it scales no logits")
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    num_rows, vocabulary = logits.shape
    nll = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    liger_cross_entropy_kernel[(num_rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=targets,
        Y_stride=targets.stride(0),
        weight_ptr=None,
        loss_ptr=nll,
        z_loss_ptr=None,
        loss_stride=nll.stride(0),
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocabulary,
        n_non_ignore=num_rows,
        sum_non_ignore_weight=num_rows,
        weight_sum=0.0,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="none",
        softcap=tail.softcap,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=tail.softcap is not None,
        HAS_GRADIENTS=wanted,
        BLOCK_SIZE=min(32768, 1 << (vocabulary - 1).bit_length()),
        num_warps=32,
    )
    return nll, logits


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total += factor * left.T @ right, summed in fp32 whatever the dtype of left and right."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right, alpha=factor)
    elif total.device.type == "cpu":
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), alpha=factor)
    elif total.device.type == "cuda" and torch.version.hip is None:
        # low-precision factors, fp32 sum
        torch.addmm(total, left.T, right, alpha=factor, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left.T, right), alpha=factor)


def of_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: HeadRequest,
    needs: tuple[bool, ...],
    sums: Sums | None,
) -> tuple[Tensor, Gradients]:
    """torch >= 2.13. It makes gradients in the forward pass of a sum only; by position it computes the logits again."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError("it needs torch >= 2.13")
    from torch.nn import LinearCrossEntropyOptions

    assert request.targets is not None
    assert sums is None
    if request.tail.scale != 1.0 or request.tail.softcap is not None:
        raise ValueError("it neither scales nor caps logits")
    hidden, weight = hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
    bias = None if bias is None else bias.detach().requires_grad_(needs[2])
    wanted = [tensor for tensor, need in zip((hidden, weight, bias), needs, strict=True) if tensor is not None and need]
    with torch.enable_grad():
        nll = F.linear_cross_entropy(
            hidden,
            weight,
            request.targets,
            linear_bias=bias,
            reduction="none" if request.by_position else "sum",
            options=LinearCrossEntropyOptions(),
        )
        found = iter(torch.autograd.grad(nll.sum(), wanted)) if wanted else iter(())
    of_hidden, of_weight, of_bias = (next(found) if need else None for need in needs)
    return nll.detach().float(), (of_hidden, of_weight, of_bias)


WAYS: dict[str, Way] = {
    "chunked": partial(in_chunks, softmax_gradient),
    "liger": partial(in_chunks, liger_gradient),
    "torch": of_torch,
}
