"""Documents of a packed row: isolated to the bit, equal to documents alone; what a model cannot is tried."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    RwkvConfig,
    StableLmConfig,
)

from distft.config.schema import Model
from distft.errors import UserMistake
from distft.model import varlen
from distft.model.attention import choose, choose_for, disagreement, is_isolated, isolated
from distft.model.miniature import miniature
from distft.model.varlen import VARLEN, band, by_document, packed_arguments

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WINDOWS = {**SIZES, "sliding_window": 5}
NEOX = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
LENGTHS = (9, 1, 14, 6)

PACKED = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**WINDOWS),
    "gemma3": Gemma3TextConfig(**WINDOWS, layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": GPTNeoXConfig(**NEOX),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}


def build(config: Any, implementation: str = VARLEN) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def row(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS]


def arguments(config: Any) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    given = packed_arguments(config, positions, bounds, max(LENGTHS), LENGTHS, torch.float32)
    return {"position_ids": positions, **given}


def logits_and_gradient(model: nn.Module, documents: list[Tensor], weigh: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits by document, and the gradient of document `weigh`'s logits with respect to every document's embeddings."""
    ids = torch.cat(documents)[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    logits = model(inputs_embeds=embedded, **arguments(model.config)).logits[0].split(LENGTHS)
    logits[weigh].square().sum().backward()
    assert embedded.grad is not None
    return [part.detach() for part in logits], list(embedded.grad[0].split(LENGTHS))


@pytest.mark.parametrize("name", [name for name in PACKED if name != "mixtral"])
@pytest.mark.parametrize("edited", range(len(LENGTHS)))
def test_documents_are_isolated_to_the_bit(name: str, edited: int) -> None:
    """Forward and backward, whichever document is edited: before it, after it, of one token."""
    model, documents = build(PACKED[name]), row()
    other = (edited + 1) % len(LENGTHS)
    before, gradient_before = logits_and_gradient(model, documents, other)
    documents[edited] = 98 - documents[edited]
    after, gradient_after = logits_and_gradient(model, documents, other)
    for index in range(len(LENGTHS)):
        assert torch.equal(before[index], after[index]) == (index != edited)
    assert torch.equal(gradient_before[other], gradient_after[other])
    assert gradient_after[other].any()
    assert not gradient_after[edited].any()


@pytest.mark.parametrize("name", PACKED)
def test_equals_one_document_a_row(name: str) -> None:
    config = PACKED[name]
    model, documents = build(config), row()
    own = build(config, "eager")
    with torch.no_grad():
        packed = model(input_ids=torch.cat(documents)[None], **arguments(config)).logits[0].split(LENGTHS)
        width = max(LENGTHS)
        padded = torch.stack([F.pad(document, (0, width - len(document))) for document in documents])
        unpacked = model(input_ids=padded).logits
        for index, document in enumerate(documents):
            alone = own(input_ids=document[None]).logits[0]
            scale = alone.abs().max()
            assert (packed[index] - alone).abs().max() <= 1e-6 * scale
            assert (unpacked[index, : len(document)] - alone).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("name", PACKED)
def test_naive_packing_fails(name: str) -> None:
    small = miniature(PACKED[name])
    assert small is not None
    assert is_isolated(small, VARLEN)
    assert not is_isolated(small, VARLEN, naive=True)


def test_a_window_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = miniature(PACKED["mistral"])
    assert small is not None
    assert disagreement(small, VARLEN) == ""

    def without_window(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, _: int | None) -> Tensor:
        return by_document(q, k, v, dropout, scaling, None)

    monkeypatch.setattr(varlen, "by_document", without_window)
    assert disagreement(small, VARLEN) == "varlen attention gives other logits than eager"


def test_choice_of_common_models() -> None:
    for name, config in PACKED.items():
        choice = choose_for(config, "auto")
        assert (choice.implementation, choice.packs, choice.reason) == (VARLEN, True, ""), name


@pytest.mark.parametrize(
    ("config", "implementation", "reason"),
    [
        (Gemma2Config(**SIZES, attn_logit_softcapping=1.0), "eager", "softcap"),
        (GptOssConfig(**SIZES, num_local_experts=4), "eager", "s_aux"),
        (Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2), "sdpa", "logits"),
        (StableLmConfig(**NEOX, num_key_value_heads=2), "sdpa", "boundaries"),
    ],
    ids=["gemma2_softcap", "gpt_oss_sinks", "llama4_chunks", "stablelm_drops_arguments"],
)
def test_what_varlen_lacks_takes_a_slower_path(config: Any, implementation: str, reason: str) -> None:
    choice = choose_for(config, "auto", name="the model")
    assert (choice.implementation, choice.packs) == (implementation, True)
    assert reason in choice.reason
    assert "slower" in choice.reason
    if reason == "boundaries":
        assert not choose_for(config, VARLEN).packs
    else:
        with pytest.raises(UserMistake, match=r"model\.attention=auto"):
            choose_for(config, VARLEN)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_the_slower_path_equals_one_document_a_row(name: str) -> None:
    config: Any = Gemma2Config(**WINDOWS, attn_logit_softcapping=1.0)
    if name == "gpt_oss":
        config = GptOssConfig(**WINDOWS, num_local_experts=4, num_experts_per_tok=2)
    model, documents = build(config, "eager"), row()
    with torch.no_grad():
        packed = model(input_ids=torch.cat(documents)[None], **arguments(config)).logits[0].split(LENGTHS)
        for document, logits in zip(documents, packed, strict=True):
            alone = model(input_ids=document[None]).logits[0]
            assert (logits - alone).abs().max() <= 5e-6 * alone.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
        Mamba2Config(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1),
        RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=64),
        Lfm2Config(**NEOX, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["mamba", "mamba2", "rwkv", "convolution", "bloom_counts_from_the_row"],
)
def test_what_mixes_outside_attention_is_not_packed(config: Any) -> None:
    assert not choose_for(config, "auto").packs


def test_choose_from_a_folder(tmp_path: Any) -> None:
    PACKED["qwen3"].save_pretrained(tmp_path)
    knobs = Model(name="hf")
    choice = choose(tmp_path, knobs)
    assert (choice.implementation, choice.packs) == (VARLEN, True)
    assert isolated(tmp_path, knobs, choice)
    knobs.attention = "eager"
    assert choose(tmp_path, knobs).implementation == "eager"
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32


def test_trying_is_quick() -> None:
    """A 70B's configuration: the copy does not grow with it."""
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=128256)  # fmt: skip
    started = time.perf_counter()
    assert choose_for(config, "auto").packs
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("window", [1, 3, 4, 7, 20])
def test_windows_block_by_block(window: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    behind = torch.arange(11)[:, None] - torch.arange(11)
    mask = (behind >= 0) & (behind < window)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(by_document(query, key, value, 0.0, None, window), expected)
    assert torch.equal(band(11, 11, window, query.device), mask)


def test_what_is_lacking_is_refused() -> None:
    module, q = nn.Module(), torch.randn(1, 2, 4, 8)
    for lacking in ({"softcap": 5.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}):
        with pytest.raises(ValueError, match="varlen attention"):
            varlen.varlen_attention(module, q, q, q, None, **lacking)
    with pytest.raises(ValueError, match="no mask"):
        varlen.varlen_attention(module, q, q, q, torch.ones(1, 1, 4, 4))
