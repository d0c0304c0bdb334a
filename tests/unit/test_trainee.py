"""The trainee against a model's own forward: loss, gradients, layouts, mixtures of experts, PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from distft.data.batch import Batch
from distft.model import attention
from distft.model.attention import choose_for
from distft.objective.trainee import (
    CPU_LOGITS,
    MOST_CPU_LOGITS,
    LogitsRequest,
    LossRequest,
    LossSums,
    Trainee,
    cpu_chunk,
    gpu_chunk,
)

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "max_position_embeddings": 64}  # fmt: skip
LENGTHS = (7, 1, 12, 4)


def build(config: Any, implementation: str = attention.VARLEN) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def batches() -> tuple[Batch, Batch]:
    """The same documents packed and one a row; every other token is supervised; sources alternate."""
    tokens = documents()
    starts = [sum(LENGTHS[:index]) for index in range(len(LENGTHS))]
    width = max(LENGTHS)
    flat, padded, targets, sources = [], [], [], []
    for index, document in enumerate(tokens):
        for column in range(0, len(document) - 1, 2):
            flat.append(starts[index] + column)
            padded.append(index * width + column)
            targets.append(int(document[column + 1]))
            sources.append(index % 2)
    common: dict[str, Any] = {
        "max_length": width, "targets": torch.tensor(targets), "sources": torch.tensor(sources),
        "num_tokens": sum(LENGTHS), "lengths": LENGTHS,
    }  # fmt: skip
    rows = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for row, document in enumerate(tokens):
        rows[row, : len(document)], mask[row, : len(document)] = document, True
    packed = Batch(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        attention_mask=None,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        positions=torch.tensor(flat),
        **common,
    )
    one_a_row = Batch(
        input_ids=rows,
        position_ids=torch.arange(width).expand(len(LENGTHS), -1),
        attention_mask=mask,
        cu_seqlens=None,
        positions=torch.tensor(padded),
        **common,
    )
    return packed, one_a_row


def plain_loss(model: nn.Module) -> tuple[Tensor, list[float]]:
    """Sum of NLL over the same tokens, document by document, with the model's own forward and full logits."""
    total, by_source = torch.zeros(()), [0.0, 0.0]
    for index, document in enumerate(documents()):
        if len(document) < 2:
            continue
        logits = model(input_ids=document[None]).logits[0]
        columns = torch.arange(0, len(document) - 1, 2)
        nll = F.cross_entropy(logits[columns].float(), document[columns + 1], reduction="sum")
        by_source[index % 2] += nll.item()
        total = total + nll
    return total, by_source


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, list[float], dict[str, Tensor]]:
    model = build(LlamaConfig(**SIZES), "eager")
    total, by_source = plain_loss(model)
    (total * 0.5).backward()
    return total.detach(), by_source, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", [0, 1], ids=["packed", "one_a_row"])
@pytest.mark.parametrize("implementation", ["varlen", "sdpa", "eager"])
def test_equals_the_model_document_by_document(layout: int, implementation: str, reference: Any) -> None:
    expected, by_source, gradients = reference
    trainee = Trainee(build(LlamaConfig(**SIZES), implementation), vocab_chunk=3)
    answer = trainee(LossRequest(batches()[layout], scale=0.5, num_sources=2))
    assert isinstance(answer, LossSums)
    answer.loss.backward()
    torch.testing.assert_close(answer.loss.detach(), expected * 0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(answer.nll, torch.tensor(by_source), rtol=1e-5, atol=0)
    assert answer.counts.tolist() == [float((batches()[0].sources == source).sum()) for source in (0, 1)]
    assert trainee.notes == ()
    for name, parameter in trainee.model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - gradients[name]).norm() <= 2e-6 * gradients[name].norm(), name


def test_boundaries_matter(reference: Any) -> None:
    """Negative control: one long document out of the same tokens has another loss."""
    packed, _ = batches()
    joined = Batch(**{**vars(packed), "lengths": (24,), "cu_seqlens": torch.tensor([0, 24], dtype=torch.int32)})
    answer = Trainee(build(LlamaConfig(**SIZES)))(LossRequest(joined, scale=0.5, num_sources=2))
    assert abs(answer.loss - reference[0] * 0.5) > 1e-3 * reference[0]


def test_logits_request() -> None:
    model = build(LlamaConfig(**SIZES, tie_word_embeddings=True))
    _, rows = batches()
    with torch.no_grad():
        expected = model(input_ids=rows.input_ids).logits.flatten(0, 1)
        trainee = Trainee(model)
        positions = torch.tensor([6, 12, 24, 35])
        request = LogitsRequest(rows.input_ids, rows.position_ids, rows.attention_mask, positions)
        torch.testing.assert_close(trainee(request), expected[positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_an_empty_micro_batch_reaches_every_parameter(kind: str) -> None:
    config = LlamaConfig(**SIZES) if kind == "llama" else mixtral()
    trainee = Trainee(build(config))
    answer = trainee(LossRequest(Batch.empty(), scale=0.1, share=0.0, num_sources=2))
    answer.loss.backward()
    assert answer.loss == 0
    assert answer.counts.tolist() == [0, 0]
    for name, parameter in trainee.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("implementation", ["varlen", "eager"])
def test_an_empty_micro_batch_of_a_model_that_is_never_packed(implementation: str) -> None:
    """Empty micro-batches are packed rows by form; a model without positions or packing must take them all the same."""
    from transformers import BloomConfig, MambaConfig

    config: Any = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    if implementation == "varlen":
        config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    trainee = Trainee(build(config, implementation))
    answer = trainee(LossRequest(Batch.empty(), scale=0.1, share=0.0))
    answer.loss.backward()
    assert answer.loss == 0
    assert all(parameter.grad is not None for parameter in trainee.parameters())
    full = trainee(LossRequest(batches()[1], scale=1.0, num_sources=2))
    total, _ = plain_loss(build(config, implementation))
    torch.testing.assert_close(full.loss.detach(), total.detach(), rtol=1e-5, atol=0)


def mixtral() -> MixtralConfig:
    return MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("layout", [0, 1], ids=["packed", "one_a_row"])
def test_balance_loss_of_experts(kind: str, layout: int) -> None:
    """Against the model's own where padding is masked, against the formula where documents are packed."""
    config: Any = mixtral()
    if kind == "qwen2_moe":
        config = Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            output_router_logits=True, router_aux_loss_coef=0.5,
        )  # fmt: skip
    batch = batches()[layout]
    model = build(config, "eager")
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "output_router_logits": True}
    if layout:
        expected = model(**inputs, attention_mask=batch.attention_mask).aux_loss
    else:
        expected = unmasked_balance(model.model(**inputs, attention_mask=packed_mask(LENGTHS)).router_logits)
    trainee = Trainee(build(config))
    answer = trainee(LossRequest(batch, scale=0.0, share=0.25, num_sources=2))
    torch.testing.assert_close(answer.auxiliary, expected.detach() * 0.5 * 0.25, rtol=1e-5, atol=0)
    torch.testing.assert_close(answer.loss.detach(), answer.auxiliary)
    answer.loss.backward()
    (expected * 0.125).backward()
    gradients = dict(model.named_parameters())
    router = next(name for name in gradients if "gate.weight" in name)
    got, want = dict(trainee.model.named_parameters())[router].grad, gradients[router].grad
    assert want is not None
    assert want.any()
    assert (got - want).norm() <= 1e-5 * want.norm()


def packed_mask(lengths: tuple[int, ...]) -> Tensor:
    """[1, 1, length, length] additive mask, causal inside documents, made here without the code under test."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]


def unmasked_balance(router_logits: tuple[Tensor, ...]) -> Tensor:
    """Switch Transformers' loss over all tokens of all layers, written out for 2 of 4 experts."""
    logits = torch.cat(router_logits)
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(2, dim=-1).indices, 4).float().sum(1).mean(0)
    return 4 * (chosen * probabilities.mean(0)).sum()


def test_without_router_logits_there_is_no_balance_loss() -> None:
    config = mixtral()
    config.output_router_logits = False
    answer = Trainee(build(config))(LossRequest(batches()[0], scale=0.1, num_sources=2))
    assert answer.auxiliary == 0


@pytest.mark.parametrize("dora", [False, True])
def test_through_peft(dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", r=4, use_dora=dora)
    torch.manual_seed(1)
    peft_model: Any = get_peft_model(build(LlamaConfig(**SIZES)), config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    expected, _ = plain_loss(peft_model)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.grad is not None}
    peft_model.zero_grad()
    calls = []
    for name, module in peft_model.named_modules():
        if name.endswith(("lm_head", "embed_tokens", "layers.1", "q_proj", "down_proj")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    trainee = Trainee(peft_model)
    answer = trainee(LossRequest(batches()[0], scale=1.0, num_sources=2))
    assert len(calls) == len(set(calls)) == 7  # engines gather once for each module and pass
    answer.loss.backward()
    torch.testing.assert_close(answer.loss.detach(), expected.detach(), rtol=1e-6, atol=0)
    assert set(gradients) == {name for name, p in peft_model.named_parameters() if p.grad is not None}
    for name, parameter in peft_model.named_parameters():
        if parameter.grad is not None:
            assert "lora_" in name
            assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-7, name


def test_prompt_tuning_keeps_positions_right() -> None:
    """PEFT puts virtual tokens before the row: the supervised positions move with the tokens."""
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(build(LlamaConfig(**SIZES)), config)
    _, rows = batches()
    expected = torch.zeros(())
    with torch.no_grad():
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits[:, 3:].flatten(0, 1)
        expected = F.cross_entropy(logits[rows.positions], rows.targets, reduction="sum")
    answer = Trainee(model)(LossRequest(rows, scale=1.0, num_sources=2))
    answer.loss.backward()
    torch.testing.assert_close(answer.loss.detach(), expected, rtol=1e-5, atol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.parametrize("layout", [0, 1], ids=["packed", "one_a_row"])
def test_the_slower_path_is_right_and_says_so(layout: int, monkeypatch: pytest.MonkeyPatch, reference: Any) -> None:
    monkeypatch.setattr("distft.objective.trainee.head_complaint", lambda model: "a tail that is not known")
    expected, _, gradients = reference
    trainee = Trainee(build(LlamaConfig(**SIZES)))
    assert "a tail that is not known" in trainee.notes[0]
    answer = trainee(LossRequest(batches()[layout], scale=0.5, num_sources=2))
    answer.loss.backward()
    torch.testing.assert_close(answer.loss.detach(), expected * 0.5, rtol=1e-6, atol=0)
    for name, parameter in trainee.model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 2e-6 * gradients[name].norm(), name


def test_bf16_under_autocast_and_in_bf16_weights() -> None:
    """A tiny random model in bf16: 2% of the loss is the bound."""
    exact = Trainee(build(LlamaConfig(**SIZES)))(LossRequest(batches()[0], scale=1.0, num_sources=2)).loss
    trainee = Trainee(build(LlamaConfig(**SIZES)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = trainee(LossRequest(batches()[0], scale=1.0, num_sources=2)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss != exact
    assert abs(loss - exact) <= 0.02 * exact
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainee.parameters())
    trainee = Trainee(build(LlamaConfig(**SIZES)).to(torch.bfloat16))
    low = trainee(LossRequest(batches()[0], scale=1.0, num_sources=2)).loss
    low.backward()
    assert abs(low - exact) <= 0.02 * exact


def test_choice_and_trainee_agree_on_softcap() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(**SIZES, attn_logit_softcapping=0.5, final_logit_softcapping=3.0, sliding_window=3,
                          query_pre_attn_scalar=8)  # fmt: skip
    choice = choose_for(config, "auto")
    assert (choice.implementation, choice.packs) == ("eager", True)
    total, _ = plain_loss(build(config, "eager"))
    answer = Trainee(build(config, choice.implementation))(LossRequest(batches()[0], scale=1.0, num_sources=2))
    torch.testing.assert_close(answer.loss.detach(), total.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocabulary", [300, 8_000, 32_000, 50_257, 128_000, 256_000, 1_000_000])
def test_positions_at_a_time_on_a_cpu(vocabulary: int) -> None:
    chunk = cpu_chunk(vocabulary)
    assert chunk % 64 == 0
    assert chunk == 64 or chunk * vocabulary <= MOST_CPU_LOGITS
    assert chunk >= 256 or (chunk + 64) * vocabulary > MOST_CPU_LOGITS
    assert chunk <= 256 or chunk * vocabulary <= CPU_LOGITS


@pytest.mark.parametrize(
    ("vocabulary", "gib", "chunk"),
    [(128_256, 139.8, 2048), (128_256, 79, 1024), (128_256, 24, 512), (32_000, 24, 2048)],
)
def test_positions_at_a_time_on_a_gpu(vocabulary: int, gib: float, chunk: int) -> None:
    """On an H200, an H100, and a card of 24 GiB with many words and with few."""
    assert gpu_chunk(vocabulary, int(gib * 2**30)) == chunk
