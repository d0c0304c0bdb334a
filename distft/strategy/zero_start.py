"""DeepSpeed's start without what a run does not need: Muon's compiler, second copies, memory touched before its use.

DeepSpeed lays out parameters that hold nothing yet; distft streams the weights in behind it. So nothing that is copied
or cleared meanwhile means anything, and under ZeRO-3 a rank may take no more than its part of the model for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import stage3
from torch import Tensor

from distft.perf import give_back

LARGE = 1024**2  # bytes


def import_muon() -> None:
    """DeepSpeed imports its Muon whatever the optimizer, and that loads torch's compiler to make kernels of it."""
    plain = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = plain


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Inside, ZeRO-3's optimizer is made with one copy of fp32 weights, and with memory that is not touched yet."""
    engine = stage3.DeepSpeedZeroOptimizer_Stage3
    kept: list[tuple[Any, str, Any]] = [
        (stage3, "defragment", stage3.defragment),
        (engine, "_create_fp32_partitions", engine._create_fp32_partitions),
        (engine, "create_reduce_and_remove_grad_hooks", engine.create_reduce_and_remove_grad_hooks),
        (torch, "zeros", torch.zeros),
    ]
    stage3.defragment = laid_out
    engine._create_fp32_partitions = one_copy(engine._create_fp32_partitions)
    engine.create_reduce_and_remove_grad_hooks = without_gathering(engine.create_reduce_and_remove_grad_hooks)
    torch.zeros = untouched(torch.zeros)
    try:
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)
        give_back()


def laid_out(tensors: Sequence[Tensor]) -> Tensor:
    """In place of `defragment`: the tensors become views of one new buffer; what they held is not copied."""
    lengths = [tensor.numel() for tensor in tensors]
    for tensor in tensors:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    give_back()
    buffer = torch.empty(sum(lengths), dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, part in zip(tensors, buffer.split(lengths), strict=True):
        tensor.data = part
    return buffer


def one_copy(create: Callable[[Any], None]) -> Callable[[Any], None]:
    """Where weights are fp32 already they are their own master: DeepSpeed means that, but compares a device with a
    string."""

    def create_partitions(optimizer: Any) -> None:
        named = optimizer.device
        if not optimizer.offload_optimizer:
            optimizer.device = torch.device(named)
        try:
            create(optimizer)
        finally:
            optimizer.device = named

    return create_partitions


def without_gathering(create: Callable[[Any], None]) -> Callable[[Any], None]:
    """Gradient hooks without gathering every parameter for it, which torch before 2.1 needed."""

    def create_hooks(optimizer: Any) -> None:
        parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        gathers = [parameter.all_gather for parameter in parameters]
        for parameter in parameters:
            parameter.all_gather = lambda: None
        try:
            create(optimizer)
        finally:
            for parameter, gather in zip(parameters, gathers, strict=True):
                parameter.all_gather = gather

    return create_hooks


def untouched(zeros: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.zeros` that takes large fp32 vectors on the CPU from pages which the system clears at their first use."""

    def cleared(*size: Any, **options: Any) -> Tensor:
        on_cpu = str(options.get("device")) == "cpu" and options.get("dtype") is torch.float32
        if on_cpu and len(size) == 1 and isinstance(size[0], int) and 4 * size[0] >= LARGE:
            return torch.from_numpy(numpy.zeros(size[0], dtype=numpy.float32))
        return zeros(*size, **options)

    return cleared
