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
from torch.utils._pytree import tree_leaves
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
    "distft::adapted_linear",
)

THIN = 16  # a product is thin where its output is this much wider than the dimension it sums over


def enable(model: nn.Module, blocks: Iterable[nn.Module], mode: str) -> None:
    """Checkpoint these blocks: `none`, `selective` (keep matrix products and attention) or `full` (keep inputs only).

    Call it once, after PEFT has wrapped `model` and after blocks were compiled. Evaluation and passes without gradients
    are not changed, nor blocks that neither train anything nor pass a gradient on.
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

    trained = any(parameter.requires_grad for parameter in block.parameters())

    @functools.wraps(forward)
    def with_checkpoint(*arguments: Any, **named: Any) -> Any:
        if not (block.training and torch.is_grad_enabled() and (trained or needs_gradient(arguments, named))):
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, **named, **options)

    return with_checkpoint


def needs_gradient(*inputs: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))


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
        if function in kept_operators() and not is_thin(function, arguments):
            return self.mode.__torch_dispatch__(function, types, arguments, named)
        return function(*arguments, **(named or {}))


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def is_thin(function: Any, arguments: tuple[Any, ...]) -> bool:
    """A product that makes much out of little, such as an adapter's second one: cheaper to repeat than to keep."""
    if function._schema.name not in PRODUCTS:
        return False
    inner, width = arguments[-1].shape[-2:]
    return bool(THIN * inner <= width)


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
