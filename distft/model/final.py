"""The final folder: written as plain Hugging Face or PEFT, then read back and compared with what was trained."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.config.schema import Run
from distft.errors import NegativeVerdict
from distft.model.load import build
from distft.model.mapping import open_weights
from distft.model.probe import Probe, Recorded
from distft.model.proof import PROOF_FILE, Proof, weight_hashes, write_proof
from distft.model.tuning import wrap
from distft.model.verify import verify_folder
from distft.weights.findings import refuse_wrong
from distft.weights.store import Weights, read_whole
from distft.weights.write import new_folder, write_sharded

ONE_FILE = 2**62  # bytes: PEFT reads no index

NamedTensors = Iterable[tuple[str, Tensor]]


# --- writing --------------------------------------------------------------------------------------------------------


def save_final(
    folder: Path,
    base: Path,
    run: Run,
    tensors: NamedTensors,
    tokenizer: Any,
    probe: Probe | None = None,
    precision: str = "fp32",
    base_hashes: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write what was trained, streamed, for one process (rank 0) to call. Returns each stored tensor's XXH3-128.

    Args:
        folder: gets this content all at once; an older one is replaced.
        base: the model folder that training started from.
        tensors: whole trained tensors under the names they had before `prepare`, one at a time (`Strategy.gather`).
        tokenizer: with its chat template settled.
        probe: the trainer's logits, which `distft.json` keeps for `distft verify`; None: it keeps none.
        precision: fp32 or bf16, what the trainer computed them in.
        base_hashes: of the base's weight files where they are known; else an adapter's base is read for them.

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
        is_model = run.tuning.method == "full"
        trained_on = {"path": str(base.absolute())} if is_model else {"files": base_hashes or weight_hashes(base)}
        write_proof(staging, "model" if is_model else "adapter", hashes, trained_on, tokenizer, probe, precision)
    return hashes


def write_model(staging: Path, base: Path, run: Run, tensors: NamedTensors) -> dict[str, str]:
    shutil.copyfile(base / "config.json", staging / "config.json")
    if run.model.trust_remote_code:
        for code in base.glob("*.py"):
            shutil.copyfile(code, staging / code.name)
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


def check_final(
    folder: Path,
    hashes: dict[str, str],
    probe: Probe,
    run: Run,
    precision: str,
    device: torch.device | None = None,
    max_bytes: float = math.inf,
    say: Callable[[str], None] | None = None,
) -> float:
    """Compare the folder with what was trained: bit for bit as written, then logits under plain transformers or PEFT.

    `distft verify` makes the same checks later, with what the folder's own `distft.json` holds in the place of what
    training still knows here.

    Args:
        hashes: what `save_final` returned.
        precision: fp32 or bf16, what the trainer computed in.
        max_bytes: of memory for the plain model; where it needs more, its logits are left out.
        say: is told what was left out.

    Returns the distance of the two models' logits relative to their spread, nan where they were left out.

    Raises:
        NegativeVerdict: a tensor differs, is missing or too many, or the plain model computes something else.
    """
    own = Proof.read(folder)
    if own is None:
        raise NegativeVerdict(f"{folder / PROOF_FILE} is missing: the folder was not written whole.")
    proof = dataclasses.replace(own, tensors=hashes, precision=precision, prompts=Recorded.of(probe).as_json())
    findings = verify_folder(folder, max_bytes, run.model.trust_remote_code, proof, device)
    refuse_wrong(findings)
    for finding in findings:
        if finding.passed is None and say is not None:
            say(f"{folder.name}/: {finding}")
    return next((one.value for one in findings if one.what == "logits" and one.value is not None), math.nan)
