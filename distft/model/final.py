"""The final folder: written as plain Hugging Face or PEFT, then read back and compared with what was trained."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distft.config.schema import Run
from distft.errors import NegativeVerdict
from distft.model.load import build
from distft.model.mapping import open_weights
from distft.model.plain import load_plain
from distft.model.tuning import wrap
from distft.weights.store import FolderWeights, Weights, read_whole, shard_files
from distft.weights.write import hash_of, new_folder, write_sharded

ADAPTER_FILE = "adapter_model.safetensors"
ONE_FILE = 2**62  # bytes: PEFT reads no index
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of the logits' spread; rounding a whole model to bf16 costs about 0.01
NOISE = {"fp32": 1e-4, "bf16": 0.02}  # below it, two logits say nothing about whether weights differ

NamedTensors = Iterable[tuple[str, Tensor]]


# --- writing --------------------------------------------------------------------------------------------------------


def save_final(folder: Path, base: Path, run: Run, tensors: NamedTensors, tokenizer: Any) -> dict[str, str]:
    """Write what was trained, streamed, for one process (rank 0) to call. Returns each stored tensor's XXH3-128.

    Args:
        folder: gets this content all at once; an older one is replaced.
        base: the model folder that training started from.
        tensors: whole trained tensors under the names they had before `prepare`, one at a time (`Strategy.gather`).
        tokenizer: with its chat template settled.

    full: the base's configuration, and weights in the base's element types and file layout of names, so that plain
    `from_pretrained` loads them. lora: a PEFT folder that names its base; adapters stay fp32 as they were trained.
    """
    with new_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
        if run.tuning.method == "full":
            hashes = write_model(staging, base, run, tensors)
        else:
            hashes = write_adapter(staging, base, run, tensors)
        write_generation_config(staging, base, tokenizer)
    return hashes


def write_model(staging: Path, base: Path, run: Run, tensors: NamedTensors) -> dict[str, str]:
    shutil.copyfile(base / "config.json", staging / "config.json")
    if run.model.trust_remote_code:
        for code in base.glob("*.py"):
            shutil.copyfile(code, staging / code.name)
    with torch.device("meta"):
        model = build(base, run)
    stored = open_weights(base, model)
    return write_sharded(staging, stored_names(model, completed(stored, tensors)))


def completed(stored: Weights, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Trained tensors in the base's element type, then whatever was not trained, from the base."""
    left = dict.fromkeys(stored.names())
    for name, tensor in tensors:
        if name not in left:
            raise ValueError(f"{name} is no weight of the base model, or came twice")
        del left[name]
        yield name, tensor.to(stored.dtype(name))
    for name in left:
        yield name, read_whole(stored, name)


def stored_names(model: Any, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names and in the pieces in which transformers stores this model, such as one file entry an
    expert. Pieces that belong together wait for each other; everything else passes straight on."""
    from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    mapping = [
        entry for entry in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(entry, PrefixChange)
    ]
    if not mapping:
        yield from tensors
        return
    model._weight_conversions = mapping
    reverse = [entry.reverse_transform() for entry in reversed(mapping)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    group_of = {name: group_name(name, converters) for name in model.state_dict()}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    sizes: dict[str, int] = defaultdict(int)
    for name, group in group_of.items():
        sizes[group] += name not in tied
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        group = group_of[name]
        waiting[group][name] = tensor
        if len(waiting[group]) == sizes[group]:
            yield from revert_weight_conversion(model, waiting.pop(group)).items()
    for rest in waiting.values():
        yield from revert_weight_conversion(model, rest).items()


def group_name(name: str, converters: list[Any]) -> str:
    """The name under which transformers collects what one converter turns into stored tensors together."""
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return str(renamed)
    return name


def write_adapter(staging: Path, base: Path, run: Run, tensors: NamedTensors) -> dict[str, str]:
    """Adapters are small: they are collected, then named by PEFT itself."""
    from peft import get_peft_model_state_dict

    with torch.device("meta"):
        model = build(base, run)
    wrapped = wrap(model, run.tuning)
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
    if missing := [n for n, parameter in wrapped.named_parameters() if parameter.requires_grad and n not in state]:
        raise ValueError(f"{len(missing)} adapters were not given, the first {missing[0]}")
    named = get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
    hashes = write_sharded(staging, named.items(), stem="adapter_model", shard_bytes=ONE_FILE)
    config = wrapped.peft_config["default"]
    given = run.model.path
    is_hub_id = run.model.name == "hf" and given is not None and not Path(given).expanduser().exists()
    config.base_model_name_or_path = given if is_hub_id else str(base.absolute())
    config.revision = run.model.revision
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(staging)
    return hashes


def write_generation_config(staging: Path, base: Path, tokenizer: Any) -> None:
    """The base's own, and generation stops at the token that the chat template ends a turn with."""
    path = base / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stops = values.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops = [*stops, tokenizer.eos_token_id]
    if stops:
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if values.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
        values["pad_token_id"] = tokenizer.pad_token_id
    (staging / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# --- reading back ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Logits that the trainer computed at a few positions with the weights it is about to save."""

    input_ids: Tensor  # [rows, length] int64, right-padded
    attention_mask: Tensor  # [rows, length] bool, True on real tokens
    positions: Tensor  # [n] int64, row * length + column
    logits: Tensor  # [n, vocab] on the CPU


def check_final(
    folder: Path, hashes: dict[str, str], probe: Probe, run: Run, precision: str, device: torch.device | None = None
) -> float:
    """Compare the folder with what was trained: bit for bit as written, then logits under plain transformers or PEFT.

    `hashes`: what `save_final` returned. `precision`: fp32 or bf16, what the trainer computed in. Returns the distance
    of the two models' logits relative to their spread.

    Raises:
        NegativeVerdict: a tensor differs, is missing or too many, or the plain model computes something else.
    """
    check_tensors(folder, hashes)
    model = load_plain(folder, precision, device or torch.device("cpu"), run.model.trust_remote_code)
    low = precision == "bf16" or any("bf16" in name or "bfloat16" in name for name in element_types(folder))
    tolerance, noise = TOLERANCE["bf16" if low else "fp32"], NOISE["bf16" if low else "fp32"]
    difference = distance(logits_of(model, probe), probe.logits)
    if not difference <= tolerance:
        raise NegativeVerdict(
            f"{folder}: loaded by plain transformers, its logits differ from the trainer's by {difference:.2g} of "
            f"their spread, more than {tolerance:g}. It is not the model that was trained."
        )
    if (folder / ADAPTER_FILE).exists():
        with model.disable_adapter():
            untrained = distance(logits_of(model, probe), probe.logits)
        if difference > max(noise, untrained / 2):
            raise NegativeVerdict(
                f"{folder}: its logits are {difference:.2g} of their spread from the trainer's, the base model's "
                f"{untrained:.2g}. The adapters do not do what they did in training."
            )
    return difference


def check_tensors(folder: Path, hashes: dict[str, str]) -> None:
    """Every tensor as it lies on disk against its hash."""
    weights = FolderWeights(folder, weight_files(folder))
    names = set(weights.names())
    if names != set(hashes):
        one = sorted(names ^ set(hashes))[0]
        raise NegativeVerdict(f"{folder}: {one} is {'missing' if one in hashes else 'there but was never written'}.")
    for name in weights.names():
        if hash_of(read_whole(weights, name)) != hashes[name]:
            raise NegativeVerdict(f"{folder}: {name} is not what was written: the disk or the file is damaged.")


def weight_files(folder: Path) -> list[str]:
    return [ADAPTER_FILE] if (folder / ADAPTER_FILE).exists() else shard_files(folder)[0]


def element_types(folder: Path) -> set[str]:
    weights = FolderWeights(folder, weight_files(folder))
    return {str(weights.dtype(name)) for name in weights.names()}


@torch.no_grad()
def logits_of(model: nn.Module, probe: Probe) -> Tensor:
    """[n, vocab] fp32 on the CPU, of a plain model."""
    device = next(model.parameters()).device
    logits = model(input_ids=probe.input_ids.to(device), attention_mask=probe.attention_mask.long().to(device)).logits
    return logits.flatten(0, 1)[probe.positions.to(device)].float().cpu()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square difference relative to the logits' spread around their mean at each position."""
    theirs = theirs.float().cpu()
    spread = theirs - theirs.mean(dim=-1, keepdim=True)
    return float((ours - theirs).norm() / spread.norm().clamp_min(1e-12))
