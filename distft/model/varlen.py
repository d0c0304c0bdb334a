"""Attention inside documents: several documents share a row and none sees another, without a mask being made.

`varlen` is registered with transformers as an attention implementation. On a CPU every document is one call of
`scaled_dot_product_attention`; on CUDA a whole row is one call of FlashAttention's variable-length kernel (Dao 2023):
of flash-attn where it is installed, else the one inside PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

VARLEN = "varlen"


def packed_arguments(
    config: Any, position_ids: Tensor, cu_seqlens: Tensor, max_length: int, lengths: Sequence[int], dtype: torch.dtype
) -> dict[str, Any]:
    """What a model's forward is given besides ids and positions so that the documents of a packed row stay apart.

    config: the model's, whose attention implementation decides. position_ids: [1, length], from 0 in every document.
    cu_seqlens: [documents + 1] int32 on the device. lengths: the documents' lengths on the host, so that no layer waits
    for the device. dtype: in which the model computes.
    """
    if config.get_text_config()._attn_implementation != VARLEN:
        from transformers.masking_utils import create_masks_for_generate

        shape = torch.empty(*position_ids.shape, 1, dtype=dtype, device=position_ids.device)
        # Not every model hands its positions on to where its masks are made, so they are made here.
        return {"attention_mask": create_masks_for_generate(config, shape, None, None, position_ids=position_ids)}
    return {
        "cu_seq_lens_q": cu_seqlens,  # these four are what transformers' own flash attention listens to
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_length,
        "max_length_k": max_length,
        "document_lengths": Documents(lengths),
    }


class Documents:
    """The documents' lengths. No tuple, since torch.compile would make another graph for every other tuple."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = tuple(lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_lengths: Iterable[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a packed row, or inside each row where documents have their own.

    query: [rows, heads, length, head size]; key, value: [rows, key heads, length, head size]. Rows must be padded on
    the right only: a causal query then never sees padding, and no mask is needed. sliding_window: keys that a query
    sees, itself included. Returns [rows, length, heads, head size].

    Raises:
        ValueError: the model asks for something that this path does not compute.
    """
    refuse_what_is_lacking(module, query, key, attention_mask, is_causal, others)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if document_lengths is None:
        return by_document(query, key, value, dropout, scaling, sliding_window), None
    if query.device.type == "cuda" and max_length_q is not None and cu_seq_lens_q is not None:
        kernel = kernel_for(query, value, dropout)
        if kernel is not None:
            # `squeeze` and no index: what comes back is then a view too, and no copy into zeros.
            q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
            return kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None
    lengths = list(document_lengths)
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    return torch.cat([by_document(q, k, v, dropout, scaling, sliding_window) for q, k, v in parts], dim=1), None


def refuse_what_is_lacking(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None, others: dict[str, Any]
) -> None:
    for name in ("softcap", "s_aux", "position_bias", "alibi", "cache"):
        if others.get(name) is not None:
            raise ValueError(f"varlen attention lacks {name}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("varlen attention is causal, and this is not")
    if mask is not None:
        raise ValueError("varlen attention takes no mask, and the model makes one of its own")
    if query.shape[2] != key.shape[2]:
        raise ValueError("varlen attention takes no cache")


def by_document(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of whole rows, each one document: [rows, heads, length, size] -> [rows, length, heads, size]."""
    length = query.shape[2]
    windowed = window is not None and window < length
    gqa = query.shape[1] != key.shape[1]
    if gqa and query.device.type == "cuda" and (windowed or query.dtype == torch.float32):
        # Without FlashAttention CUDA's fused kernels know no groups, and the one that does makes all scores at once.
        group = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1), False
    if not windowed:
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=gqa
        )
        return out.transpose(1, 2)
    assert window is not None
    blocks = []
    for start in range(0, length, window):  # a block of queries sees itself and the block of keys before it
        stop, first = min(start + window, length), max(0, start - window + 1)
        mask = band(stop - start, stop - first, window, query.device)
        keys, values = key[:, :, first:stop], value[:, :, first:stop]
        blocks.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop], keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=gqa
            ).transpose(1, 2)
        )
    return torch.cat(blocks, dim=1)


@functools.lru_cache(maxsize=64)
def band(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last query stands at the last key, each sees `window` keys up to its own."""
    behind = (
        torch.arange(num_queries, device=device)[:, None]
        + (num_keys - num_queries)
        - torch.arange(num_keys, device=device)
    )
    return (behind >= 0) & (behind < window)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, "float | None", "int | None"], Tensor]


def kernel_for(query: Tensor, value: Tensor, dropout: float) -> Kernel | None:
    """A fused kernel that takes these tensors; None: they are computed document by document.

    FlashAttention needs an Ampere GPU or newer, half precision and a head size of at most 256, a multiple of 8.
    """
    size = query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16) or size > 256 or size % 8:
        return None
    if value.shape[-1] != size or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    if has_flash_attention():
        return functools.partial(flash_attention, dropout=dropout)
    if not has_torch_varlen() or dropout:
        return None
    return torch_varlen


@functools.cache
def has_flash_attention() -> bool:
    """Whether flash-attn is installed and loads with this torch."""
    if find_spec("flash_attn") is None:
        return False
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:  # built for another torch
        return False
    return True


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scaling: float | None,
    window: int | None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """[tokens, heads, size] -> the same shape, by the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, max_length, max_length,
        dropout_p=dropout, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return out


def has_torch_varlen() -> bool:
    """Whether this torch was built with FlashAttention."""
    return bool(torch.backends.cuda.is_flash_attention_available())


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """[tokens, heads, size] -> the same shape, by FlashAttention inside PyTorch; key and value may have fewer heads.

    The operator that `torch.nn.attention.varlen.varlen_attn` calls: that function is written in Python, forward and
    backward, and knows groups of heads only from torch 2.13 on.
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, window is None, False,
        scale=scaling, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return out


# No mask function is registered beside it: transformers then makes no mask at all, and does not look into the positions
# for documents either, where the host would wait for the device in every forward pass.
AttentionInterface.register(VARLEN, varlen_attention)
