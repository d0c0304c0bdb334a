"""Fused kernels of a GPU, put on a model: nearly the model's own numbers, and really in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from distft.model import kernels
from tests.gpu.places import GPU
from tests.unit.test_kernels import SIZES


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("mode", ["auto", "liger"])
@pytest.mark.parametrize(
    ("config", "gated"), [(LlamaConfig, "SwiGLU"), (Qwen3Config, "SwiGLU"), (Gemma3TextConfig, "GeGLU")]
)
def test_a_model_with_them(config: Any, gated: str, mode: str, device: str) -> None:
    pytest.importorskip("liger_kernel.ops", reason="needs liger-kernel")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config(**SIZES)).to(device, torch.bfloat16)
    ids = torch.arange(1, 90, device=device)[None]
    plain = model(input_ids=ids).logits.float()
    assert kernels.apply(model, mode, torch.device(device)) == [f"Fused kernels: RMSNorm, RoPE, {gated}"]
    fused = model(input_ids=ids).logits.float()
    assert not torch.equal(fused, plain)  # other kernels round otherwise: they are really in use
    assert (fused - plain).norm() <= 0.02 * plain.norm()
