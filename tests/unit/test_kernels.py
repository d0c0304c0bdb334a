"""Fused kernels: refused without a GPU, put on instances only; there and without one the model computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config
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
    assert kernels.apply(model, "none", CPU) == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert kernels.apply(model, "auto", CPU) == []
    replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert replaced == [*["LlamaMLP", "LlamaRMSNorm", "LlamaRMSNorm"] * 2, "LlamaRMSNorm"]
    assert not any("forward" in vars(module) for module in llama().modules()), "this instance's alone"
    with pytest.raises(UserMistake, match=r"model\.kernels=liger needs a CUDA GPU.*model\.kernels=auto"):
        kernels.apply(model, "liger", CPU)


def trained(model: Any, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits and gradients of a pass, and the bytes kept for its backward part (shared memory counts once)."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids).logits
        loss = logits.float().square().mean()
    loss.backward()
    return (
        logits.detach(),
        {name: one.grad for name, one in model.named_parameters() if one.grad is not None},
        sum(kept.values()),
    )


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (LlamaConfig, {"RMSNorm", "SwiGLU"}),
        (Qwen3Config, {"RMSNorm", "SwiGLU"}),
        (Gemma3TextConfig, {"RMSNorm", "GeGLU"}),
        (GPTNeoXConfig, set()),
    ],
)
def test_plain_torch_computes_the_same_and_keeps_less(config: Any, layers: set[str]) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config(**SIZES, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    assert set(kernels.proven(model, CPU, kernels.lean_kinds())) == layers
    ids = torch.arange(1, 90).view(1, -1)
    logits, gradients, kept = trained(model, ids, torch.float32)
    assert kernels.apply(model, "auto", CPU) == []
    lean_logits, lean, lean_kept = trained(model, ids, torch.float32)
    assert torch.allclose(lean_logits, logits, rtol=1e-6, atol=1e-6)
    assert lean.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (lean[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert lean_kept < 0.95 * kept if layers else lean_kept == kept


def test_plain_torch_under_autocast() -> None:
    """As near to fp32 as the model's own code is."""
    model, ids = llama(), torch.arange(1, 90)[None]
    exact = trained(model, ids, torch.float32)[1]
    own = trained(model, ids, torch.bfloat16)[1]
    kernels.apply(model, "auto", CPU)
    lean = trained(model, ids, torch.bfloat16)[1]
    for name, gradient in exact.items():
        assert (lean[name] - gradient).norm() <= 1.5 * (own[name] - gradient).norm() + 1e-6, name


def test_under_autocast_a_norm_casts_once_for_all_that_follow() -> None:
    """To the bits that each product would have made of it."""
    model, ids = llama(), torch.arange(1, 90)[None]
    kernels.apply(model, "auto", CPU)
    norm, products = model.model.layers[0].input_layernorm, []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: products.append((inputs[0], output)))
        for layer in (getattr(model.model.layers[0].self_attn, f"{letter}_proj") for letter in "qkv")
    ]
    with torch.no_grad():
        states = model.model.embed_tokens(ids)
        wide = norm(states)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids)
            assert norm(states).dtype == torch.bfloat16
            expected = model.model.layers[0].self_attn.q_proj(wide)
    for hook in hooks:
        hook.remove()
    assert wide.dtype == torch.float32
    given = [tensor for tensor, _ in products[:3]]
    assert all(tensor is given[0] and tensor.dtype == torch.bfloat16 for tensor in given)
    assert torch.equal(products[0][1], expected)


def test_frozen_weights_get_no_gradient() -> None:
    model, ids = llama(), torch.arange(1, 20)[None]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" in name
    plain = trained(model, ids, torch.float32)[1]
    kernels.apply(model, "auto", CPU)
    lean = trained(model, ids, torch.float32)[1]
    assert lean.keys() == plain.keys()
    assert all((lean[name] - plain[name]).norm() <= 1e-5 * plain[name].norm() for name in plain)


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

    kinds: dict[str, list[kernels.Patch]] = {"RoPE": [kernels.fuse_rotary]}
    model = llama()
    with monkeypatch.context() as inside:
        inside.setattr(kernels, "rotate", wrong)
        assert kernels.proven(model, CPU, kinds) == {}
    monkeypatch.setattr(kernels, "rotate", modeling_llama.apply_rotary_pos_emb)
    assert set(kernels.proven(model, CPU, kinds)) == {"RoPE"}
    assert not any("forward" in vars(module) for module in model.modules())
