"""Fused kernels: refused without a GPU, put on instances only; on a GPU the model computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama

from distft.errors import UserMistake
from distft.model import kernels

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
CPU = torch.device("cpu")


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))


def test_without_a_gpu() -> None:
    model = llama()
    assert kernels.apply(model, "auto", CPU) == []
    assert kernels.apply(model, "none", CPU) == []
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UserMistake, match=r"model\.kernels=liger needs a CUDA GPU.*model\.kernels=auto"):
        kernels.apply(model, "liger", CPU)


def test_rotary_is_replaced_on_one_instance_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement here is the model's own function, counted: it is called, and other instances do not see it."""
    calls = []

    def counted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        calls.append(q.shape)
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(kernels, "rotate", counted)
    model, ids = llama(), torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    assert calls == []
    assert [kernels.fuse_rotary(layer.self_attn) for layer in model.model.layers[:1]] == [True]
    assert not kernels.fuse_rotary(model.model.layers[0].mlp)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(calls) == 1
    llama()(input_ids=ids)
    assert len(calls) == 1


def test_a_kernel_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return q, k

    monkeypatch.setattr(kernels, "kinds", lambda: {"RoPE": [kernels.fuse_rotary]})
    model = llama()
    with monkeypatch.context() as inside:
        inside.setattr(kernels, "rotate", wrong)
        assert kernels.proven(model, CPU) == {}
    monkeypatch.setattr(kernels, "rotate", modeling_llama.apply_rotary_pos_emb)
    assert set(kernels.proven(model, CPU)) == {"RoPE"}
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("config", "gated"), [(LlamaConfig, "SwiGLU"), (Qwen3Config, "SwiGLU"), (Gemma3TextConfig, "GeGLU")]
)
def test_on_a_gpu(config: Any, gated: str) -> None:
    pytest.importorskip("liger_kernel.ops", reason="needs liger-kernel")
    torch.manual_seed(0)
    device = torch.device("cuda")
    model: Any = AutoModelForCausalLM.from_config(config(**SIZES)).to(device, torch.bfloat16)
    ids = torch.arange(1, 90, device=device)[None]
    plain = model(input_ids=ids).logits.float()
    assert kernels.apply(model, "liger", device) == [f"Fused kernels: RMSNorm, RoPE, {gated}"]
    fused = model(input_ids=ids).logits.float()
    assert not torch.equal(fused, plain)  # other kernels round otherwise: they are really in use
    assert (fused - plain).norm() <= 0.02 * plain.norm()
