"""What is saved is what was trained: plain loading gives the trainer's logits, and every loss of that is noticed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distft.config.schema import Run, Tuning
from distft.config.schema.model import Model
from distft.errors import NegativeVerdict, UserMistake
from distft.model import final, tuning
from distft.model.plain import load_plain
from distft.model.probe import NOISE, distance, logits_of
from distft.model.proof import PROOF_FILE, Proof
from distft.weights.store import FolderWeights, read_whole
from distft.weights.write import hash_file, hash_of
from tests.unit import folders

LORA = Tuning(method="lora", lora_rank=4)


class Trained:
    """A model after training (its trained weights moved at random), as an engine would hand it over."""

    def __init__(self, kind: str, tmp_path: Path, chosen: Tuning, dtype: torch.dtype = torch.float32) -> None:
        self.base = folders.save(folders.make_model(kind, dtype), tmp_path / "base")
        self.tokenizer = folders.tokenizer()
        self.tokenizer.save_pretrained(self.base)
        self.run = Run(model=Model(name="hf", path=str(self.base)), tuning=chosen)
        self.folder = tmp_path / "final"
        model, weights = folders.born(self.base, self.run)
        model, weights = tuning.apply(model, chosen, weights, 0)
        self.model = folders.fill(model, weights)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def gather(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach().clone()

    def probe(self) -> final.Probe:
        input_ids = folders.ids()
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        mask[1, 9:] = False  # right padding
        positions = torch.tensor([0, 5, 12, 13 + 8])
        with torch.no_grad():
            logits = self.model(input_ids=input_ids, attention_mask=mask.long()).logits.flatten(0, 1)[positions]
        return final.Probe(input_ids, mask, positions, logits)

    def save(self) -> dict[str, str]:
        return final.save_final(self.folder, self.base, self.run, self.gather(), self.tokenizer, self.probe())

    def check(self, hashes: dict[str, str]) -> float:
        return final.check_final(self.folder, hashes, self.probe(), self.run, "fp32")


KINDS = [
    "llama, tied",
    "gemma3",
    "gpt2",
    "mixtral, experts apart",
    "hrm text, projections fused",
    "deepseek v3, stored buffer",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_model_comes_back(kind: str, tmp_path: Path) -> None:
    trained = Trained(kind, tmp_path, Tuning())
    hashes = trained.save()
    assert trained.check(hashes) < 1e-5
    stored, before = FolderWeights(trained.folder), FolderWeights(trained.base)
    assert set(stored.names()) == set(before.names())  # the base's own names and pieces
    assert all(stored.dtype(name) == before.dtype(name) for name in before.names())
    assert (trained.folder / "config.json").read_bytes() == (trained.base / "config.json").read_bytes()
    plain = dict(folders.plain(trained.folder).named_parameters())
    assert all(torch.equal(plain[name], tensor) for name, tensor in trained.gather())
    assert not list(tmp_path.glob("final.*"))


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        ("llama, tied", LORA),
        ("llama", Tuning(method="lora", rslora=True, target=["q_proj", "lm_head"])),
        ("gemma3", Tuning(method="lora", dora=True, lora_rank=4)),
        ("gpt2", LORA),
        ("mixtral, experts apart", LORA),
        ("llama", Tuning(method="lora", lora_rank=4, target=["embed_tokens", "q_proj"])),
    ],
)
def test_an_adapter_comes_back(kind: str, chosen: Tuning, tmp_path: Path) -> None:
    trained = Trained(kind, tmp_path, chosen)
    hashes = trained.save()
    assert trained.check(hashes) < 1e-5
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained.base.absolute())
    assert config["inference_mode"]
    assert not (trained.folder / "model.safetensors").exists()
    plain = dict(load_plain(trained.folder, "fp32", torch.device("cpu")).named_parameters())
    assert all(torch.equal(plain[name], tensor) for name, tensor in trained.gather())


def test_a_hub_id_stays_the_name_of_the_base(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, LORA)
    trained.run.model.path, trained.run.model.revision = "someone/llama", "v2"
    trained.save()
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/llama", "v2")


def test_a_bf16_base_stays_bf16(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, Tuning(), torch.bfloat16)
    hashes = trained.save()
    stored = FolderWeights(trained.folder)
    assert {stored.dtype(name) for name in stored.names()} == {torch.bfloat16}
    assert 1e-4 < trained.check(hashes) < 0.05  # the trainer's fp32 against its own rounding
    plain = dict(folders.plain(trained.folder).named_parameters())
    assert all(torch.equal(plain[name], tensor.bfloat16().float()) for name, tensor in trained.gather())


def test_frozen_weights_come_from_the_base(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, Tuning())
    trained.model.model.norm.weight.requires_grad_(False)
    with torch.no_grad():
        trained.model.model.norm.weight.copy_(folders.plain(trained.base).model.norm.weight)
    assert trained.check(trained.save()) < 1e-5


def test_generation_stops_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, Tuning())
    (trained.base / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "temperature": 0.3}))
    trained.save()
    values = json.loads((trained.folder / "generation_config.json").read_text())
    assert values == {"eos_token_id": [9, 1], "temperature": 0.3, "pad_token_id": 2}


def test_a_name_that_is_no_weight(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, Tuning())
    stray = [*trained.gather(), ("model.stray", torch.zeros(1))]
    with pytest.raises(ValueError, match=r"model\.stray is no weight"):
        final.save_final(trained.folder, trained.base, trained.run, stray, trained.tokenizer)
    assert not trained.folder.exists()
    adapted = Trained("llama", tmp_path / "lora", LORA)
    with pytest.raises(ValueError, match="adapters were not given"):
        final.save_final(adapted.folder, adapted.base, adapted.run, list(adapted.gather())[1:], adapted.tokenizer)
    assert not adapted.folder.exists()


# --- negative controls: break the folder, see it noticed -------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, str]:
    """Change the stored tensors, and every hash that is kept of them: only logits can tell now."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    weights = FolderWeights(folder, [file.name])
    hashes = {name: hash_of(read_whole(weights, name)) for name in weights.names()}
    proof = Proof.read(folder)
    assert proof is not None
    files = {**proof.files, file.name: {"num_bytes": file.stat().st_size, "xxh3_128": hash_file(file)}}
    (folder / PROOF_FILE).write_text(dataclasses.replace(proof, tensors=hashes, files=files).text())
    return hashes


def flip_a_bit(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(torch.int32)[0, 0] ^= 1


def zero_the_adapters(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def turn_the_adapters_round(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.neg_()


@pytest.mark.parametrize("chosen", [Tuning(), LORA], ids=["full", "lora"])
def test_one_bit_is_noticed(chosen: Tuning, tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, chosen)
    hashes = trained.save()
    trained.check(hashes)
    rewrite(trained.folder, flip_a_bit)
    with pytest.raises(NegativeVerdict, match="is not what was written"):
        trained.check(hashes)
    rewrite(trained.folder, lambda tensors: tensors.popitem())
    with pytest.raises(NegativeVerdict, match=r"is (missing|not what was written)"):
        trained.check(hashes)


def test_a_zeroed_adapter_is_noticed(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, LORA)
    trained.save()
    with pytest.raises(NegativeVerdict, match="it does nothing: in each of its 14 pairs"):
        trained.check(rewrite(trained.folder, zero_the_adapters))
    trained.save()
    with pytest.raises(NegativeVerdict, match="not the model that was trained"):
        trained.check(rewrite(trained.folder, turn_the_adapters_round))


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_another_adapter_of_small_effect_is_noticed(size: float, tmp_path: Path) -> None:
    """After a few steps an adapter moves the logits by less than the tolerance: it is measured against the base."""
    trained = Trained("llama", tmp_path, LORA)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    assert trained.check(trained.save()) < 1e-5
    hashes = rewrite(trained.folder, turn_the_adapters_round)
    assert distance(logits_of(folders.plain(trained.base), trained.probe()), trained.probe().logits) > 1e-4
    with pytest.raises(NegativeVerdict, match=r"not the model|adapters do not do"):
        trained.check(hashes)


def test_bf16_adapters_come_back_and_zeroed_ones_do_not(tmp_path: Path) -> None:
    """As the engines compute a LoRA run in bf16: frozen bf16 weights, fp32 adapters, autocast."""
    trained = Trained("llama", tmp_path, LORA)
    for parameter in trained.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        probe = trained.probe()
    hashes = trained.save()
    assert final.check_final(trained.folder, hashes, probe, trained.run, "bf16") < NOISE["bf16"]
    with pytest.raises(NegativeVerdict):
        final.check_final(trained.folder, rewrite(trained.folder, turn_the_adapters_round), probe, trained.run, "bf16")


def test_another_full_model_is_noticed(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, Tuning())
    trained.save()
    with pytest.raises(NegativeVerdict, match="not the model that was trained"):
        trained.check(rewrite(trained.folder, lambda tensors: tensors["model.norm.weight"].add_(0.1)))


def test_logits_that_are_no_numbers_are_noticed(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, Tuning())
    trained.save()
    with pytest.raises(NegativeVerdict, match="nan"):
        trained.check(rewrite(trained.folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)))


def test_a_base_that_is_gone(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, LORA)
    trained.save()
    trained.base.rename(tmp_path / "moved")
    with pytest.raises(UserMistake, match="which is gone"):
        load_plain(trained.folder, "fp32", torch.device("cpu"))
