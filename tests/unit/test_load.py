"""From a folder to a model: the same logits as plain transformers, and one message for everything that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distft.config.schema import Run
from distft.config.schema.model import Model
from distft.errors import UserMistake
from distft.model.load import blocks, build, finish_buffers, load_tokenizer, open_weights, resolve, restore_ties
from distft.model.mapping import Converted
from distft.weights.store import FolderWeights, Overlay
from tests.unit import folders

ARCHITECTURES = list(folders.CONFIGS)
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_same_model_as_plain_transformers(kind: str, tmp_path: Path) -> None:
    folder = folders.save(folders.make_model(kind), tmp_path)
    plain = folders.plain(folder)
    model, weights = folders.born(folder)
    assert set(weights.names()) <= {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert set(dict(model.named_parameters())) <= set(weights.names())
    assert all(weights.shape(name) == tuple(tensor.shape) for name, tensor in model.named_parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    folders.fill(model, weights)
    ours, theirs = dict(model.named_buffers()), dict(plain.named_buffers())
    assert set(ours) == set(theirs)
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(folders.logits(model), folders.logits(plain))
    assert len(blocks(model)) == 2
    assert not model.config.use_cache


@pytest.mark.parametrize("kind", ["llama, tied", "llama 3 rope", "gemma3", "gpt-j, tables a layer"])
def test_without_finished_buffers_it_would_be_another_model(kind: str, tmp_path: Path) -> None:
    folder = folders.save(folders.make_model(kind), tmp_path)
    model, weights = folders.born(folder)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights.names():
                parameter.copy_(weights.read(name).view(parameter.shape))
    assert not torch.equal(folders.logits(model), folders.logits(folders.plain(folder)))


def test_ties_are_restored(tmp_path: Path) -> None:
    folder = folders.save(folders.make_model("llama, tied"), tmp_path)
    model, _ = folders.born(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    restore_ties(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_experts_stored_apart_are_stacked_group_by_group(tmp_path: Path) -> None:
    folder = folders.save(folders.make_model("mixtral, experts apart"), tmp_path)
    model, weights = folders.born(folder)
    assert isinstance(weights, Overlay)
    assert any("experts.3.w1" in name for name in FolderWeights(folder).names())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = folders.plain(folder).get_parameter(name).detach().view(-1)
    assert torch.equal(weights.read(name), whole)
    assert torch.equal(weights.read(name, 1000, 501), whole[1000:1501])
    converted = next(each for each in weights._of.values() if isinstance(each, Converted))
    assert {*converted._tensors} == {name}  # no other group is held
    assert {entry.partition(".layers.")[2][:1] for entry, _ in converted.groups[name].sources} == {"1"}
    assert model.get_parameter(name).shape == weights.shape(name)


def test_a_folder_of_the_bare_decoder(tmp_path: Path) -> None:
    """Saved without its head's prefix, tied: names differ by `model.`."""
    whole = folders.make_model("llama, tied")
    folder = folders.save(whole.model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert "embed_tokens.weight" in FolderWeights(folder).names()
    assert torch.equal(folders.logits(folders.fill(*folders.born(folder))), folders.logits(whole))


def test_only_the_head_of_a_tie_is_stored(tmp_path: Path) -> None:
    whole = folders.make_model("llama, tied")
    folder = folders.save(whole, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(folders.logits(folders.fill(*folders.born(folder))), folders.logits(whole))


def test_a_tie_between_different_tensors_is_refused(tmp_path: Path) -> None:
    folder = folders.save(folders.make_model("llama, tied"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    folders.born(folder)  # stored twice, but equal
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserMistake, match='"tie_word_embeddings": false'):
        folders.born(folder)


def test_shards_and_a_missing_or_misshapen_weight(tmp_path: Path) -> None:
    whole = folders.make_model("llama")
    folder = folders.save(whole, tmp_path / "a", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(folders.logits(folders.fill(*folders.born(folder))), folders.logits(whole))
    folder = folders.save(whole, tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserMistake, match=r"lacks 1 of the .* the first model\.norm\.weight"):
        folders.born(folder)
    save_file({**tensors, "model.norm.weight": norm[:-1]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserMistake, match=r"model\.norm\.weight is stored as \[31\].* says \[32\]"):
        folders.born(folder)


def test_blocks_of_a_nested_list() -> None:
    """Experts that are modules of their own lie in lists inside the blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))

    model = folders.make_model("llama")
    model.model.layers = nn.ModuleList(Block() for _ in range(2))
    assert blocks(model) == list(model.model.layers)


def test_buffers_leave_weights_alone_and_take_plain_attributes(tmp_path: Path) -> None:
    folder = folders.save(folders.make_model("gemma3"), tmp_path)
    model = folders.fill(*folders.born(folder))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.model.rotary_emb.sliding_attention_inv_freq.zero_()
    model.model.embed_tokens.embed_scale.zero_()
    finish_buffers(model, CPU)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert torch.equal(folders.logits(model), folders.logits(folders.plain(folder)))


# --- what a person may give -----------------------------------------------------------------------------------------


def run_of(path: Path | str, **kwargs: Any) -> Run:
    return Run(model=Model(name="hf", path=str(path), **kwargs))


def no_texts() -> list[str]:
    raise AssertionError("a folder needs no texts")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = folders.save(folders.make_model("llama"), tmp_path / "llama-good")
    folders.tokenizer().save_pretrained(folder)
    return folder


def test_a_good_folder_is_taken_as_it_is(good: Path) -> None:
    run = run_of(good)
    assert resolve(run, no_texts) == good
    tokenizer = load_tokenizer(good, run)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    with torch.device("meta"):
        assert build(good, run, "eager").config._attn_implementation == "eager"


def test_each_fault_of_a_folder_has_its_cure(good: Path) -> None:
    def complaint(**kwargs: Any) -> str:
        with pytest.raises(UserMistake) as caught:
            resolve(run_of(good, **kwargs), no_texts)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "model.revision=v1" in complaint(revision="v1")
    config = (good / "config.json").read_text()
    quantised = {**json.loads(config), "quantization_config": {"quant_method": "gptq"}}
    (good / "config.json").write_text(json.dumps(quantised))
    assert "give the unquantised model" in complaint()
    (good / "config.json").write_text(json.dumps({"model_type": "nobody", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "set model.trust_remote_code=true" in complaint()
    (good / "config.json").write_text(json.dumps({"model_type": "nobody"}))
    assert "transformers cannot read it" in complaint()
    (good / "config.json").write_text(config)
    (good / "tokenizer.json").rename(good / "kept")
    (good / "tokenizer_config.json").unlink()
    assert "no tokenizer" in complaint()
    (good / "kept").rename(good / "tokenizer.json")
    resolve(run_of(good), no_texts)
    (good / "model.safetensors").rename(good / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in complaint()
    (good / "pytorch_model.bin").unlink()
    assert "has no safetensors weights" in complaint()
    (good / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base"}))
    assert "model.path=/models/base" in complaint()
    (good / "adapter_config.json").unlink()
    (good / "config.json").unlink()
    assert "holds no config.json" in complaint()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
import torch

class LoudConfig(LlamaConfig):
    model_type = "loud"

class LoudForCausalLM(LlamaForCausalLM):
    config_class = LoudConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("volume", torch.linspace(1, 2, config.vocab_size), persistent=False)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.volume
        return out
"""


def test_code_of_the_folder_runs_only_when_trusted(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(good.parent / "modules"))
    monkeypatch.setattr("sys.path", [str(good.parent / "modules"), *sys.path])
    (good / "loud.py").write_text(CODE)
    config = json.loads((good / "config.json").read_text())
    classes = {"AutoConfig": "loud.LoudConfig", "AutoModelForCausalLM": "loud.LoudForCausalLM"}
    config |= {"model_type": "loud", "architectures": ["LoudForCausalLM"], "auto_map": classes}
    (good / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserMistake, match=r"set model\.trust_remote_code=true"):
        resolve(run_of(good), no_texts)
    run = run_of(good, trust_remote_code=True)
    assert resolve(run, no_texts) == good
    model = folders.fill(*folders.born(good, run))
    assert type(model).__name__ == "LoudForCausalLM"
    assert torch.equal(model.volume, torch.linspace(1, 2, folders.VOCAB))
    assert torch.equal(folders.logits(model), folders.logits(folders.make_model("llama")) * model.volume)


def test_a_mistyped_path_names_the_nearest_folder(good: Path) -> None:
    with pytest.raises(UserMistake, match=rf"Did you mean {good}\?"):
        resolve(run_of(good.parent / "lama-good"), no_texts)


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserMistake, match=r"model\.path=nobody/nothing: the hub cannot be reached") as caught:
        resolve(run_of("nobody/nothing"), no_texts)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserMistake, match=r"needs model\.path"):
        resolve(Run(model=Model(name="hf")), no_texts)


# --- the tiny model -------------------------------------------------------------------------------------------------

TEXTS = [f"What is {number} + 1? It is {number + 1}, as everyone knows.\n" for number in range(300)]


def tiny_run(cache: Path, **shape: int) -> Run:
    run = Run()
    run.data.cache_dir = str(cache)
    run.model.tiny.hidden_size, run.model.tiny.num_layers, run.model.tiny.intermediate_size = 32, 2, 48
    run.model.tiny.vocab_size = 300
    for name, value in shape.items():
        setattr(run.model.tiny, name, value)
    return run


def test_the_tiny_model_is_the_same_every_time_and_cached(tmp_path: Path) -> None:
    first = resolve(tiny_run(tmp_path / "a"), lambda: TEXTS)
    again = resolve(tiny_run(tmp_path / "b"), lambda: iter(TEXTS))
    assert first.name == again.name
    assert {path.name for path in first.iterdir()} >= {"config.json", "generation_config.json", "chat_template.jinja"}
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve(tiny_run(tmp_path / "a"), lambda: TEXTS) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert resolve(tiny_run(tmp_path / "a"), lambda: [*TEXTS, "!"]) != first
    assert resolve(tiny_run(tmp_path / "a", num_layers=1), lambda: TEXTS) != first


def test_the_tiny_tokenizer_keeps_any_text_and_marks_what_is_said(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = resolve(run, lambda: TEXTS)
    tokenizer = load_tokenizer(folder, run)
    text = "Straße 128 \t\n\n  naïve — 日本語 🙂 <tag>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("128").input_ids) == 3  # digits one by one
    assert max(ids) < run.model.tiny.vocab_size
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    out = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "a<|im_end|>"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert said[-1] == tokenizer.eos_token_id == generation["eos_token_id"]
    model = folders.fill(*folders.born(folder, run))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(folders.logits(model), folders.logits(folders.plain(folder)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"vocab_size": 200}, "set it to 260 or more"),
        ({"num_heads": 5}, "must be an even multiple"),
        ({"num_kv_heads": 3}, "must be a multiple of"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_an_impossible_shape(shape: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=message):
        resolve(tiny_run(tmp_path, **shape), lambda: TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_no_text_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=r"check data\.path"):
        resolve(tiny_run(tmp_path), list)


def test_open_weights_takes_any_sharding(tmp_path: Path) -> None:
    """Names and shapes are the whole model's, also where a parameter is held in parts (DeepSpeed's `ds_shape`)."""
    folder = folders.save(folders.make_model("llama"), tmp_path)
    model, weights = folders.born(folder)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0, device="meta")
    again = open_weights(folder, model)
    assert again.names() == weights.names()
    assert all(again.shape(name) == weights.shape(name) for name in weights.names())
