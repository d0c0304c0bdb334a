"""Operations are counted by formula and checked against torch's own counter on tiny real models."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distft.data.batch import Batch, Step
from distft.perf import Cost, attended_pairs, cost_of, memory, peak_flops, peak_of

LENGTH = 24
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 32,
    "attn_implementation": "eager",
}


def build(kind: str, **changes: object) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes}))


def counted(model: nn.Module) -> int:
    """What torch counts for one row of LENGTH tokens, with every logit and the attention's full square."""
    ids = torch.arange(LENGTH)[None] % 100
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    return counter.get_total_flops()


def formula(cost: Cost) -> float:
    square = sum(kind.per_pair for kind in cost.attention) * LENGTH**2
    return (cost.per_token + cost.per_supervised) * LENGTH + square


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("gpt_neox", {"head_dim": 24}),
    ],
)
def test_full_fine_tuning_agrees_with_torch(kind: str, changes: dict[str, object]) -> None:
    model = build(kind, **changes)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    # What is left over are rotary angles: an outer product with the positions.
    assert formula(cost_of(model, blocks)) == pytest.approx(counted(model), rel=5e-4)


def test_frozen_layers_cost_less_where_nothing_trained_lies_before_them() -> None:
    model = build("llama")
    blocks = model.model.layers
    for weight in model.parameters():
        weight.requires_grad_(False)
    blocks[1].mlp.down_proj.weight.requires_grad_(True)
    cost = cost_of(model, blocks)
    assert formula(cost) == pytest.approx(counted(model), rel=4e-2)
    blocks[0].self_attn.q_proj.weight.requires_grad_(True)
    more = cost_of(model, blocks)
    assert formula(more) > 1.3 * formula(cost)
    assert formula(more) == pytest.approx(counted(model), rel=4e-2)


def test_adapters_add_their_own_products() -> None:
    """The arrangement that PEFT makes: a frozen layer and two trained matrices beside it, counted 4mn + 6(m + n)r."""
    model = build("llama", num_hidden_layers=1)
    for weight in model.parameters():
        weight.requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    before = cost_of(model, model.model.layers)
    layer.lora_A, layer.lora_B = nn.Linear(96, 8, bias=False), nn.Linear(8, 160, bias=False)
    after = cost_of(model, model.model.layers)
    down = 2 * 160 * 96  # the input's gradient of what follows the adapters
    assert after.per_token - before.per_token == 2 * 96 * 8 * 2 + 2 * 8 * 160 * 3 + down
    assert after.per_supervised == 2 * before.per_supervised


def test_experts_count_by_their_share() -> None:
    routed = {"num_local_experts": 8, "num_experts_per_tok": 2}
    sparse = build("mixtral", **routed)
    expert = 3 * 96 * 160
    router = 8 * 96
    attention = 96 * 32 * (4 + 2 + 2 + 4)
    assert cost_of(sparse, sparse.model.layers).per_token == 6 * 3 * (2 * expert + router + attention)


def test_reach_of_the_attention() -> None:
    naive = sum(min(query + 1, 8) for query in range(20)) + sum(min(query + 1, 8) for query in range(5))
    assert attended_pairs([20, 5], 8) == naive
    assert attended_pairs([20, 5]) == 20 * 21 / 2 + 15
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = build("gemma3_text", layer_types=kinds, sliding_window=8)
    cost = cost_of(mixed, mixed.model.layers)
    one_layer = 3 * 4 * 4 * 32
    assert {(kind.window, kind.per_pair) for kind in cost.attention} == {(8, 2 * one_layer), (None, one_layer)}


def batch(*lengths: int) -> Batch:
    """Packed documents, the last position of each unsupervised."""
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    total = sum(lengths)
    positions = torch.tensor([i for i in range(total) if i + 1 not in boundaries.tolist()], dtype=torch.int64)
    ids = torch.zeros(1, total, dtype=torch.int64)
    return Batch(ids, ids, None, boundaries, max(lengths), positions, positions, positions, total, (), lengths)


def test_a_step_counts_documents_not_bins() -> None:
    cost = Cost(per_token=7.0, per_supervised=11.0, attention=())
    attending = Cost(7.0, 11.0, cost_of(build("llama"), []).attention or ())
    step = Step(0, (batch(8, 4), batch(6), Batch.empty()), 15, 18, (15,), (18,), 0)
    assert cost.of_step(step) == 7 * 18 + 11 * 15 == cost.of_documents([8, 4, 6], 15)
    assert attending.of_step(step) == attending.of_documents([8, 4, 6], 15)
    twice = Step(0, step.micro_batches, 30, 36, (30,), (36,), 0)  # a second rank holds as much
    assert attending.of_step(twice) == 2 * attending.of_step(step)
    nothing = Step(0, (Batch.empty(),), 15, 18, (15,), (18,), 0)  # this rank ran short
    assert attending.of_step(nothing) == 7 * 18 + 11 * 15


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("Some GPU of next year", None),
    ],
)
def test_peak_by_name(name: str, tera: float | None) -> None:
    assert peak_of(name) == (tera and pytest.approx(tera * 1e12))


def test_no_peak_on_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_memory_of_the_process_moves_with_what_it_holds() -> None:
    device = torch.device("cpu")
    before = memory(device)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    during = memory(device)
    assert during["memory_bytes"] - before["memory_bytes"] >= 48 << 20
    del held
    after = memory(device)
    assert after["memory_bytes"] < during["memory_bytes"]
    assert after["memory_peak_bytes"] >= during["memory_bytes"] - (4 << 20)  # the kernel counts pages per thread first
