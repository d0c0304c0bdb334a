"""Attention inside the documents of a packed row: the fused kernel of a GPU against plain attention in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distft.model.varlen import by_document, kernel_for, varlen_attention
from tests.gpu.places import EVERYWHERE, GPU

LENGTHS = (37, 1, 128, 300)


def inputs(heads: int, key_heads: int, size: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as a model has them: [1, heads, length, size], the heads beside each other in memory."""
    torch.manual_seed(0)
    made = (torch.randn(1, sum(LENGTHS), count, size, device=device) for count in (heads, key_heads, key_heads))
    return [tensor.transpose(1, 2).to(dtype).requires_grad_() for tensor in made]


def expected(leaves: list[Tensor], window: int | None) -> Tensor:
    parts = zip(*(tensor.split(LENGTHS, dim=2) for tensor in leaves), strict=True)
    return torch.cat([by_document(q, k, v, 0.0, None, window) for q, k, v in parts], dim=1)


def attended(leaves: list[Tensor], window: int | None) -> Tensor:
    bounds = torch.tensor([0, *LENGTHS], device=leaves[0].device).cumsum(0).to(torch.int32)
    out, _ = varlen_attention(
        nn.Module(), *leaves, None, sliding_window=window, document_lengths=LENGTHS, cu_seq_lens_q=bounds,
        max_length_q=max(LENGTHS),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (8, 2, 64), (8, 2, 128)])
@pytest.mark.parametrize("window", [None, 50])
def test_documents_of_a_row(heads: int, key_heads: int, size: int, window: int | None, device: str) -> None:
    """bf16 on a GPU to 1 % of the norm, forward and backward; fp32 on a CPU to 1e-5."""
    dtype, bound = (torch.bfloat16, 1e-2) if device == "cuda" else (torch.float32, 1e-5)
    leaves = inputs(heads, key_heads, size, device, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out, wanted = attended(leaves, window), expected(exact, window)
    assert out.shape == wanted.shape == (1, sum(LENGTHS), heads, size)
    assert (out.double() - wanted).norm() <= bound * wanted.norm()
    direction = torch.randn_like(wanted)
    (out.double() * direction).sum().backward()
    (wanted * direction).sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert reference.grad is not None
        assert (leaf.grad.double() - reference.grad).norm() <= bound * reference.grad.norm()


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("window", [None, 50])
def test_documents_keep_apart_to_the_bit(window: int | None, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    leaves = [tensor.detach() for tensor in inputs(8, 2, 64, device, dtype)]
    before, first = attended(leaves, window), LENGTHS[0]
    leaves[1][:, :, :first] += 1
    after = attended(leaves, window)
    assert torch.equal(after[:, first:], before[:, first:])
    assert not torch.equal(after[:, :first], before[:, :first])


@pytest.mark.parametrize("device", [GPU])
def test_a_row_is_one_kernel_in_half_precision(device: str) -> None:
    query, _, value = inputs(8, 2, 64, device, torch.bfloat16)
    assert kernel_for(query, value, 0.0) is not None
    assert kernel_for(query.float(), value.float(), 0.0) is None
