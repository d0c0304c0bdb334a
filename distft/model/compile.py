"""`model.compile`: every transformer block compiled for itself (torch.compile, Ansel et al. 2024), to train with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import nn
from transformers import AttentionInterface

from distft.errors import UserMistake
from distft.model.varlen import VARLEN, varlen_attention


def enable(blocks: Iterable[nn.Module], device: torch.device, backend: str = "inductor") -> None:
    """Compile the blocks' `forward`, each on its instance: engines' hooks stay outside, checkpointing goes around it.

    Blocks share their code and so what is compiled. Lengths are symbols from the start, since no two rows are alike.
    Passes without gradients run the code as it is written.

    Raises:
        UserMistake: what compiling needs is missing here.
    """
    check(device)
    AttentionInterface.register(VARLEN, torch.compiler.disable(varlen_attention))  # document lengths differ every time
    torch.fx.experimental._config.use_duck_shape = False  # a row as long as the model is wide is no width
    # Kinds of layers x with and without a gradient below x with and without lengths; beyond it torch stops compiling.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.optimize_ddp = False  # it would cut the blocks' graphs where DDP's buckets end
    for block in blocks:
        block.forward = compiled(block, block.forward, backend)


def compiled(block: nn.Module, forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    quick = torch.compile(forward, dynamic=True, backend=backend)

    @functools.wraps(forward)
    def with_compile(*arguments: Any, **named: Any) -> Any:
        return (quick if block.training and torch.is_grad_enabled() else forward)(*arguments, **named)

    return with_compile


def check(device: torch.device) -> None:
    """Whether code for `device` can be compiled here.

    Raises:
        UserMistake: something is missing.
    """
    if missing := why_not(device):
        raise UserMistake(f"model.compile=true {missing} Or leave model.compile at false.")


def why_not(device: torch.device) -> str:
    """What is missing, with the cure; empty where nothing is."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "needs Triton (pip install triton)."
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "needs a C++ compiler on a CPU: install g++, or name one in the variable CXX."
    return ""
