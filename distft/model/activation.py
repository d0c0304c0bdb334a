"""Gradient checkpointing of transformer blocks (Chen et al. 2016): memory for a second forward pass.

Every block's `forward` is wrapped on the instance, inside the engines' hooks, so that a block is gathered once before
its forward and once before its backward pass. Non-reentrant: a block's inputs need not require gradients, and the
embeddings' output is never made to, so that frozen blocks below the first trained one are not run again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Outputs that `selective` keeps: dear to compute again, and the matrix products are what the backward pass starts from.
KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)


def enable(model: nn.Module, blocks: Iterable[nn.Module], mode: str) -> None:
    """Checkpoint every block: `none`, `selective` (keep matrix products and attention) or `full` (keep inputs only).

    Call it once, after PEFT has wrapped `model`. Evaluation and passes without gradients are not changed.
    """
    if mode == "none":
        return
    config: Any = model.config
    config.use_cache = False  # a block that runs twice would write into a cache twice
    contexts = selective if mode == "selective" else None
    for block in blocks:
        block.forward = checkpointed(block, block.forward, contexts)


def checkpointed(
    block: nn.Module, forward: Callable[..., Any], contexts: Callable[[], Any] | None
) -> Callable[..., Any]:
    """`forward` of `block`, run again in the backward pass. Dropout repeats its random numbers."""
    options: dict[str, Any] = {"use_reentrant": False}
    if contexts is not None:
        options["context_fn"] = contexts

    @functools.wraps(forward)
    def with_checkpoint(*arguments: Any, **named: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, **named, **options)

    return with_checkpoint


def selective() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    first, again = create_selective_checkpoint_contexts(list(kept_operators()))
    return OnlyKept(first), OnlyKept(again)


class OnlyKept(TorchDispatchMode):
    """Shows `mode` the kept operators and no others.

    torch wants the second pass to call every operator as often as the first; ZeRO-3's hooks gather parameters in both,
    but not by the same calls.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function in kept_operators():
            return self.mode.__torch_dispatch__(function, types, arguments, named)
        return function(*arguments, **(named or {}))


@functools.cache
def kept_operators() -> frozenset[Any]:
    """The operators in KEPT that exist here: flash-attn registers its own when it is imported."""
    found: set[Any] = set()
    for name in KEPT:
        library, operator = name.split("::")
        packet = getattr(getattr(torch.ops, library), operator, None)
        if packet is not None:
            found.update(getattr(packet, overload) for overload in packet.overloads())
    return frozenset(found)
