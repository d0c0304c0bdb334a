"""Compiled blocks: the same numbers, one set of graphs whatever the documents, and clear words where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from distft.data.batch import Batch
from distft.errors import UserMistake
from distft.model import adapters, compile
from distft.model.activation import enable
from distft.model.varlen import VARLEN, packed_arguments, varlen_attention
from distft.objective.trainee import LossRequest, Trainee

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, pad_token_id=0)  # fmt: skip
CPU = torch.device("cpu")
# The first row is as long as the model is wide: two equal sizes are not taken for the same one.
LENGTHS = ((20, 12), (9, 7, 18), (5, 6, 7, 8, 9), (40, 3))

GRAPHS_OF_A_BLOCK = 4  # attention cuts it


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No other test sees compiled code or its settings."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shapes: Any = torch.fx.experimental._config
    with torch._dynamo.config.patch(optimize_ddp=True), shapes.patch(use_duck_shape=True):
        yield
    AttentionInterface.register(VARLEN, varlen_attention)
    torch._dynamo.reset()


def trainee(backend: str | None, mode: str = "none", lora: bool = False) -> Trainee:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=VARLEN)
    blocks = list(model.model.layers)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
        adapters.apply(model, compiled=backend is not None)
    if backend:
        compile.enable(blocks, CPU, backend)
    enable(model, blocks, mode)
    return Trainee(model).train()


def row(lengths: tuple[int, ...]) -> Batch:
    total = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.arange(1, total, 2)
    return Batch(
        input_ids=(torch.arange(total)[None] * 7) % 60 + 1,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        cu_seqlens=starts,
        max_length=max(lengths),
        positions=positions,
        targets=positions % 60,
        sources=torch.zeros_like(positions),
        num_tokens=total,
        lengths=lengths,
    )


def outcome(module: Trainee, batch: Batch) -> dict[str, Tensor]:
    module.zero_grad()
    answer = module(LossRequest(batch, scale=1 / 16))
    answer.loss.backward()
    gradients = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    return {"loss": answer.loss.detach(), **gradients}


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(got) == set(expected)
    largest = max(float(value.norm()) for name, value in expected.items() if name != "loss")
    loss = float((got["loss"] - expected["loss"]).abs() / expected["loss"])
    return max(loss, *(float((got[name] - expected[name]).norm()) / largest for name in expected if name != "loss"))


@pytest.mark.parametrize(("backend", "lora"), [("inductor", False), ("eager", True)])
def test_other_documents_give_the_same_numbers_and_no_other_graphs(backend: str, lora: bool) -> None:
    """Inductor writes C++ on a CPU; its cost is why adapters are traced only."""
    plain, quick = trainee(None, lora=lora), trainee(backend, "full", lora)
    for index, lengths in enumerate(LENGTHS):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            got = outcome(quick, row(lengths))
        assert apart(got, outcome(plain, row(lengths))) < 1e-5
        if index == 0:  # under LoRA no gradient goes below the first block: it has graphs of its own
            num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert 0 < num_graphs <= (2 if lora else 1) * GRAPHS_OF_A_BLOCK


def test_nothing_but_attention_cuts_a_block_under_autocast() -> None:
    """With adapters too: torch 2.11 does not look into every question that one can ask about autocast."""
    quick = trainee("eager", lora=True)
    with torch.autocast("cpu", torch.bfloat16):
        quick(LossRequest(row(LENGTHS[0]), scale=1.0)).loss.backward()
    cuts = torch._dynamo.utils.counters["graph_break"]
    assert cuts
    assert all("varlen_attention" in reason for reason in cuts), cuts


def test_a_tuple_of_lengths_would_be_compiled_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    from distft.objective import trainee as room

    def naive(*arguments: Any) -> dict[str, Any]:
        given = packed_arguments(*arguments)
        return given | {"document_lengths": tuple(given["document_lengths"])}

    monkeypatch.setattr(room, "packed_arguments", naive)
    quick = trainee("eager")
    outcome(quick, row(LENGTHS[0]))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        outcome(quick, row(LENGTHS[1]))


def test_evaluation_runs_the_code_as_it_is_written() -> None:
    quick = trainee("eager").eval()
    quick(LossRequest(row(LENGTHS[0]), scale=1.0))
    with torch.no_grad():
        quick.train()(LossRequest(row(LENGTHS[0]), scale=1.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile.why_not(CPU) == ""
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", "/nowhere")
    cpp_builder.cpp_compiler_search.cache_clear()
    mistake = pytest.raises(UserMistake, match=r"model\.compile=true needs a C\+\+ compiler.*install g\+\+")
    with mistake:
        compile.enable([], CPU)
    cpp_builder.cpp_compiler_search.cache_clear()


def test_rows_of_one_document_need_no_lengths() -> None:
    """They are another signature: compiled once more, and right."""
    plain, quick = trainee(None), trainee("eager")
    batch = replace(row((17,)), lengths=(17,))
    assert apart(outcome(quick, batch), outcome(plain, batch)) < 1e-5
