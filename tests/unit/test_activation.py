"""Gradient checkpointing: the same gradients, less kept, nothing required of the embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from distft.data.batch import Batch
from distft.model.activation import enable, is_thin, kept_operators
from distft.objective.trainee import LossRequest, Trainee

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, pad_token_id=0)  # fmt: skip
LENGTHS = (20, 12)
BATCH = Batch(
    input_ids=(torch.arange(32)[None] * 7) % 60 + 1,
    position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
    attention_mask=None,
    cu_seqlens=torch.tensor([0, 20, 32], dtype=torch.int32),
    max_length=20,
    positions=torch.arange(0, 30, 2),
    targets=torch.arange(15),
    sources=torch.zeros(15, dtype=torch.int64),
    num_tokens=32,
    lengths=LENGTHS,
)


def trainee(mode: str, lora: str | None = None) -> Trainee:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="varlen")
    blocks = list(model.model.layers)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=lora, r=4, lora_dropout=0.5))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    enable(model, blocks, mode)
    return Trainee(model).train()


class Operators(TorchDispatchMode):
    """Counts calls of the operators that selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function in kept_operators()
        return function(*arguments, **(options or {}))


def gradients_of(module: Trainee) -> dict[str, Tensor]:
    torch.manual_seed(5)
    module(LossRequest(BATCH, scale=1.0)).loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def kept_bytes(module: Trainee) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = module(LossRequest(BATCH, scale=1.0))
    del answer
    return sum(kept.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("lora", [None, "all-linear"])
def test_gradients_keep_every_bit(mode: str, lora: str | None) -> None:
    expected, got = gradients_of(trainee("none", lora)), gradients_of(trainee(mode, lora))
    assert set(got) == set(expected)
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


def test_dropout_is_drawn_again_alike_only_because_its_state_is_kept() -> None:
    """Negative control of the bits above: other random numbers give other gradients."""
    module = trainee("full", "all-linear")
    first = {name: gradient.clone() for name, gradient in gradients_of(module).items()}
    module.zero_grad()
    torch.manual_seed(6)
    module(LossRequest(BATCH, scale=1.0)).loss.backward()
    assert any(not torch.equal(parameter.grad, first[name]) for name, parameter in module.named_parameters()
               if parameter.grad is not None)  # fmt: skip


def test_less_is_kept() -> None:
    full, none = kept_bytes(trainee("full")), kept_bytes(trainee("none"))
    assert full < 0.5 * none


def test_selective_repeats_no_matrix_product() -> None:
    counts = {}
    for mode in ("none", "selective", "full"):
        module = trainee(mode)
        with Operators() as seen:
            module(LossRequest(BATCH, scale=1.0)).loss.backward()
        counts[mode] = seen.count
    assert counts["selective"] == counts["none"] < counts["full"]


def test_an_adapters_second_product_is_repeated_rather_than_kept() -> None:
    """Its output is as large as the layer's, and it sums over few values."""
    thin, wide = ((torch.empty(8, inner), torch.empty(inner, 64)) for inner in (4, 5))
    assert is_thin(torch.ops.aten.mm.default, thin)
    assert not is_thin(torch.ops.aten.mm.default, wide)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_embeddings_need_no_gradient_under_lora(mode: str) -> None:
    module = trainee(mode, r".*layers\.1\..*_proj")
    outputs: list[Tensor] = []
    entered: list[int] = []
    blocks: Any = module.model.get_base_model().model.layers
    module.model.get_input_embeddings().register_forward_hook(lambda _, __, out: outputs.append(out))
    for index in (0, 1):  # before the call: a repeated forward stops as soon as it has what it needs
        blocks[index].mlp.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
    gradients_of(module)
    assert not outputs[0].requires_grad
    # Block 0 is frozen and below every trained weight: it is not run again.
    assert entered == ([0, 1] if mode == "none" else [0, 1, 1])


def test_evaluation_is_not_checkpointed() -> None:
    module = trainee("full").eval()
    calls: list[nn.Module] = []
    module.model.model.layers[0].mlp.register_forward_pre_hook(lambda layer, *_: calls.append(layer))
    module(LossRequest(BATCH, scale=1.0)).loss.backward()
    assert len(calls) == 1
    module.train()
    module(LossRequest(BATCH, scale=1.0)).loss.backward()
    assert len(calls) == 3  # forward, and again in the backward pass
