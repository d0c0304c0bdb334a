"""Word embeddings that add to their gradient themselves: the same sums, and no dense gradient on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from distft.model import lookup

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
PASSES = [torch.tensor([[5, 6, 5, 0, 9]]), torch.tensor([[5, 5, 1, 0], [7, 0, 0, 0]])]


def model_of(tied: bool, padding: int | None = 0) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied, pad_token_id=padding))


class DenseGradients(TorchDispatchMode):
    """Counts those that autograd makes of whole tables."""

    count = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += function is torch.ops.aten.embedding_dense_backward.default
        return function(*arguments, **(named or {}))


def gradients(model: Any) -> tuple[dict[str, Tensor], int]:
    """Summed over two passes, and how many dense gradients were made."""
    model.zero_grad()
    with DenseGradients() as dense:
        for ids in PASSES:
            model(input_ids=ids).logits.square().mean().backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, dense.count


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, None])
def test_the_sums_are_the_same(tied: bool, padding: int | None) -> None:
    model = model_of(tied, padding)
    expected, dense = gradients(model)
    assert dense == len(PASSES)
    assert lookup.enable(model)
    got, dense = gradients(model)
    assert dense == 0
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    again, _ = gradients(model)
    assert all(torch.equal(again[name], gradient) for name, gradient in got.items())


def test_evaluation_makes_no_graph() -> None:
    model = model_of(tied=True)
    lookup.enable(model)
    with torch.no_grad():
        assert not model(input_ids=PASSES[0]).logits.requires_grad


def test_what_is_left_as_it_is() -> None:
    frozen = model_of(tied=True)
    frozen.requires_grad_(False)
    assert not lookup.enable(frozen)
    scaled = model_of(tied=True)
    scaled.set_input_embeddings(nn.Embedding(96, 64, scale_grad_by_freq=True))
    assert not lookup.enable(scaled)
    torch.manual_seed(0)
    own_class: Any = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES))
    table = own_class.get_input_embeddings()
    assert lookup.enable(own_class) == (type(table) is nn.Embedding)
