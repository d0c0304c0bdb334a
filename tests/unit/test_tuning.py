"""Adapters born on meta: the same model as plain PEFT, the same first values wherever they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distft.config.schema import Tuning
from distft.errors import UserMistake
from distft.model import tuning
from distft.model.load import blocks
from distft.model.plain import quiet
from distft.weights.store import MemoryWeights, Weights, read_whole
from tests.unit import folders

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "tied, rank 3": ("llama, tied", {"lora_rank": 3, "lora_alpha": 7}),
    "rslora, head listed": ("llama", {"rslora": True, "target": ["q_proj", "lm_head"]}),
    "regular expression": ("llama", {"target": r".*\.1\..*(q|v)_proj"}),
    "dora": ("llama", {"dora": True}),
    "dora, transposed": ("gpt2", {"dora": True}),
    "dora, embedding": ("llama", {"dora": True, "target": ["embed_tokens", "q_proj"]}),
    "experts frozen": ("mixtral, experts apart", {}),
}


def tuned(kind: str, folder: Path, seed: int = 5, **knobs: Any) -> tuple[Any, Weights, Path]:
    folders.save(folders.make_model(kind), folder)
    model, weights = folders.born(folder)
    return *tuning.apply(model, Tuning(method="lora", **knobs), weights, seed), folder


def plain_peft(folder: Path, **knobs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    chosen = Tuning(**knobs)
    config = LoraConfig(
        r=chosen.lora_rank,
        lora_alpha=int(chosen.lora_alpha),
        target_modules=chosen.target,
        use_rslora=chosen.rslora,
        use_dora=chosen.dora,
        task_type="CAUSAL_LM",
    )
    with quiet():
        return get_peft_model(folders.plain(folder), config)


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_plain_peft(case: str, tmp_path: Path) -> None:
    kind, knobs = CASES[case]
    model, weights, folder = tuned(kind, tmp_path, **knobs)
    assert all(parameter.is_meta for parameter in model.parameters())
    folders.fill(model, weights)
    reference = plain_peft(folder, **knobs)
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert list(ours) == list(theirs)
    assert {name: p.requires_grad for name, p in ours.items()} == {name: p.requires_grad for name, p in theirs.items()}
    for name, parameter in theirs.items():
        if "lora_magnitude" in name:
            torch.testing.assert_close(ours[name], parameter, rtol=1e-6, atol=0)
    # Fresh adapters change nothing (DoRA: but for the rounding of norms) ...
    torch.testing.assert_close(folders.logits(model), folders.logits(folders.plain(folder)), rtol=1e-4, atol=1e-5)
    # ... and with the same values everywhere the two are the same function.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.items():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            theirs[name].copy_(parameter)
    ids = folders.ids()
    assert torch.equal(folders.logits(model, ids), folders.logits(reference, ids))
    assert not torch.equal(folders.logits(model, ids), folders.logits(folders.plain(folder), ids))


def test_first_values(tmp_path: Path) -> None:
    _, weights, folder = tuned("llama", tmp_path / "a", lora_rank=8)
    reference = dict(plain_peft(folder, lora_rank=8).named_parameters())
    drawn = [name for name in weights.names() if "lora_A" in name]
    for name in drawn:
        bound = weights.shape(name)[1] ** -0.5  # Kaiming with a = sqrt(5)
        values = read_whole(weights, name)
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.9 * bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert float(reference[name].detach().std()) == pytest.approx(float(values.std()), rel=0.25)
    assert len({tuple(weights.read(name, 0, 4).tolist()) for name in drawn}) == len(drawn)
    assert all(not weights.read(name).any() for name in weights.names() if "lora_B" in name)
    assert all(weights.dtype(name) == torch.float32 for name in weights.names())

    _, again, _ = tuned("llama", tmp_path / "b", lora_rank=8)
    _, other, _ = tuned("llama", tmp_path / "c", seed=6, lora_rank=8)
    assert all(torch.equal(weights.read(name), again.read(name)) for name in drawn)
    assert not any(torch.equal(weights.read(name), other.read(name)) for name in drawn)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_range_of_fresh_adapters(kind: str, tmp_path: Path) -> None:
    model, weights, _ = tuned(kind, tmp_path, dora=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("magnitude" in name for name in trained)
    for name in trained:
        whole = weights.read(name)
        for start, length in ((0, 1), (3, 5), (7, 9), (len(whole) - 2, 2)):
            assert torch.equal(weights.read(name, start, length), whole[start : start + length])
        with pytest.raises(IndexError):
            weights.read(name, 1, len(whole))


def test_full_trains_everything(tmp_path: Path) -> None:
    folders.save(folders.make_model("llama"), tmp_path)
    model, weights = folders.born(tmp_path)
    model.model.norm.weight.requires_grad_(False)
    same_model, same_weights = tuning.apply(model, Tuning(), weights, 0)
    assert same_model is model
    assert same_weights is weights
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_gradient_reaches_the_embeddings(tmp_path: Path) -> None:
    """PEFT makes the embeddings' output require gradients where checkpointing is on already: it is not."""
    model, weights, _ = tuned("llama", tmp_path, target=r".*\.1\..*q_proj")
    folders.fill(model, weights).train()
    seen: list[bool] = []
    hook = blocks(model)[0].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model(input_ids=folders.ids()).logits.sum().backward()
    hook.remove()
    assert seen == [False]
    assert blocks(model)[1].self_attn.q_proj.lora_B.default.weight.grad.any()

    base, _ = folders.born(tmp_path)
    blocks(base)[0].gradient_checkpointing = True
    with pytest.raises(AssertionError, match="PEFT comes first"):
        tuning.apply(base, Tuning(method="lora"), weights, 0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["q_prj"], r"q_prj matches no layer of LlamaForCausalLM\. Did you mean q_proj"),
        (["q_proj", "w9"], r"w9 matches no layer .* linear layers are down_proj"),
        ("q_proj", r"regular expression for the whole name"),
        ("(", r"no regular expression"),
        ([], r"trains nothing"),
        (["input_layernorm"], r"tuning\.target=.*not supported"),
    ],
)
def test_a_target_that_reaches_nothing(target: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        tuned("llama", tmp_path, target=target)
    assert len(str(caught.value).splitlines()) == 1


def test_all_linear_leaves_the_head(tmp_path: Path) -> None:
    model, _, _ = tuned("llama", tmp_path)
    adapters = [name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name]
    adapted = {name.rpartition(".")[2] for name in adapters}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_kind_without_a_rule() -> None:
    fresh = tuning.FreshAdapters(nn.Module(), {"a.lora_other.default": (2,)}, MemoryWeights({}), 0)
    with pytest.raises(ValueError, match="no rule"):
        fresh.read("a.lora_other.default")


def test_alpha_is_whole_where_it_can_be(tmp_path: Path) -> None:
    model, _, _ = tuned("llama", tmp_path, lora_alpha=32.0)
    assert re.search(r'"lora_alpha": 32\b(?!\.)', json.dumps({"lora_alpha": model.peft_config["default"].lora_alpha}))
