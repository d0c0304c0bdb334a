"""Whether a checkpoint is what was saved: looked over without an engine and without the ranks that wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from distft.checkpoint import layout, ranges
from distft.checkpoint.behind import available_memory
from distft.checkpoint.layout import Damaged, Manifest
from distft.checkpoint.ranges import wrong_files
from distft.config.schema import Run
from distft.config.snapshot import read_snapshot
from distft.errors import Stop
from distft.model import tuning
from distft.model.foreign import check_model
from distft.model.load import build, finish_buffers
from distft.model.logits import GIB, judge, too_large, types_of
from distft.model.mapping import open_weights
from distft.model.probe import Recorded
from distft.model.proof import weight_hashes
from distft.model.verify import PIECE, effect, serving
from distft.prepared import Prepared
from distft.strategy.base import Shard
from distft.weights.findings import Finding
from distft.weights.store import FolderWeights

NOT_RECORDED = "none were recorded: another version wrote the checkpoint, or it was not a run that did"
ALONE = "the checkpoint lies in no run folder with config.yaml and prepared.json, which name the model"


def memory_bound(max_memory: float | None) -> float:
    """`verify.max_memory` in bytes: GiB as given, or half of what is left."""
    return available_memory() / 2 if max_memory is None else max_memory * GIB


@dataclass(frozen=True)
class Origin:
    """The run that a checkpoint belongs to, as far as its folder tells."""

    run: Run
    prepared: Prepared

    @classmethod
    def of(cls, folder: Path, trust_remote_code: bool) -> Origin | None:
        run_dir = folder.absolute().parent.parent
        if folder.absolute().parent.name != layout.CHECKPOINTS or not (run_dir / "config.yaml").is_file():
            return None
        try:
            run, prepared = read_snapshot(run_dir / "config.yaml"), Prepared.read(run_dir)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        run.model.trust_remote_code = trust_remote_code  # what a file from elsewhere says does not count
        return cls(run, prepared)

    @property
    def base(self) -> Path | None:
        path = Path(self.prepared.model_folder)
        return path if (path / "config.json").is_file() else None


def verify_checkpoint(folder: Path, max_bytes: float = math.inf, trust_remote_code: bool = False) -> list[Finding]:
    """Every check of one step's folder, in order; none raises."""
    try:
        manifest = layout.check(folder)
    except Damaged as error:
        return [Finding("manifest", False, str(error))]
    said = f"step {manifest.step} of {manifest.strategy} on {manifest.world_size} ranks, {len(manifest.files)} files"
    findings = [Finding("manifest", True, said)]
    if wrong := wrong_files(folder, manifest, sorted(manifest.files)):
        return [*findings, Finding("files", False, "; ".join(wrong))]
    total = sum(record.num_bytes for record in manifest.files.values())
    findings.append(Finding("files", True, f"{total:,} bytes, as they were written"))
    origin = Origin.of(folder, trust_remote_code)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "ranges": lambda: whole(folder, manifest),
        "names and shapes": lambda: keys(manifest, origin),
        "base": lambda: base_files(manifest, origin),
        "tokenizer": lambda: tokenizer(manifest, origin),
        "logits": lambda: [logits(folder, manifest, origin, max_bytes)],
    }
    for what, check in checks.items():
        try:
            findings += check()
        except Exception as error:  # whatever a checkpoint of somebody's making leads a library to
            told = str(error) if isinstance(error, Stop | Damaged) else f"{folder}: {type(error).__name__}: {error}"
            findings.append(Finding(what, False, told))
    return findings


def whole(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """The ranks' ranges make up every parameter and moment exactly, hold numbers, and adapters do something."""
    wrong = [f"{folder}: the ranges of {key} do not make it up" for key in ranges.incomplete(folder, manifest)]
    num_values, not_zero = 0, set()
    for name in sorted(manifest.files):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                stored = file.get_slice(key)
                [length] = stored.get_shape()
                num_values += length
                is_zero, is_finite = look_through(stored, length)
                if not is_finite:
                    wrong.append(f"{folder / name}: {key} holds values that are no numbers (nan or infinity)")
                if not is_zero:
                    not_zero.add(key)
    said = f"{len(manifest.shapes)} parameters, {num_values:,} values with their moments"
    yield Finding("ranges", not wrong, "; ".join(wrong[:3]) if wrong else said)
    adapters = [name for name in manifest.shapes if ".lora_" in name]
    if adapters:
        yield effect(folder, adapters, {name for name in adapters if f"param/{name}" not in not_zero})


def look_through(stored: Any, length: int) -> tuple[bool, bool]:
    """(all values are zero, all are finite) of a range, read a piece at a time."""
    is_zero = is_finite = True
    for start in range(0, length, PIECE):
        piece: torch.Tensor = stored[start : min(start + PIECE, length)]
        is_zero = is_zero and not bool(piece.any())
        is_finite = is_finite and bool(piece.isfinite().all())
    return is_zero, is_finite


def keys(manifest: Manifest, origin: Origin | None) -> Iterator[Finding]:
    """The trained parameters against those that the run's model has."""
    if origin is None or origin.base is None:
        yield Finding("names and shapes", None, ALONE if origin is None else gone(origin))
        return
    check_model(origin.base, origin.run.model.trust_remote_code)
    with torch.device("meta"):
        model = build(origin.base, origin.run)
    model, _ = tuning.apply(model, origin.run.tuning, open_weights(origin.base, model), origin.run.seed)
    wanted = {name: list(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    differing = [name for name in {**wanted, **manifest.shapes} if wanted.get(name) != manifest.shapes.get(name)]
    if differing:
        one = differing[0]
        said = (
            f"{one} is {manifest.shapes.get(one, 'missing')} there, and {wanted.get(one, 'unknown')} in {origin.base}."
        )
        yield Finding("names and shapes", False, said)
    else:
        yield Finding("names and shapes", True, f"the {len(wanted)} trained parameters of {origin.base}")


def gone(origin: Origin) -> str:
    return f"its model {origin.prepared.model_folder} is not on this machine"


def base_files(manifest: Manifest, origin: Origin | None) -> Iterator[Finding]:
    """The frozen base, which the checkpoint does not hold, by the hashes of its files."""
    recorded = manifest.state.get("base_hashes") or {}
    if not recorded:
        return
    if origin is None or origin.base is None:
        yield Finding("base", None, ALONE if origin is None else gone(origin))
        return
    hashes = weight_hashes(origin.base)
    wrong = sorted(file for file in {*hashes, *recorded} if hashes.get(file) != recorded.get(file))
    said = f"{origin.base / wrong[0]} is not the file that it was trained on." if wrong else f"{origin.base}"
    yield Finding("base", not wrong, said)


def tokenizer(manifest: Manifest, origin: Origin | None) -> Iterator[Finding]:
    """The run's tokenizer, against what the checkpoint recorded of it."""
    words = None if origin is None else Path(origin.prepared.tokenizer_folder)
    if origin is None or origin.base is None or words is None or not words.is_dir():
        yield Finding("tokenizer", None, ALONE if origin is None else gone(origin))
        return
    if not manifest.state.get("proof"):
        yield Finding("tokenizer", None, NOT_RECORDED)
        return
    yield from serving(words, origin.base, manifest.state["proof"], origin.run.model.trust_remote_code)


def logits(folder: Path, manifest: Manifest, origin: Origin | None, max_bytes: float) -> Finding:
    """What the base and the ranges compute together, without an engine, against what the trainer had computed."""
    proof = manifest.state.get("proof")
    if not proof or not proof["prompts"]:
        return Finding("logits", None, NOT_RECORDED)
    if origin is None or origin.base is None:
        return Finding("logits", None, ALONE if origin is None else gone(origin))
    stored = FolderWeights(origin.base)
    if (left_out := too_large([stored], "fp32", max_bytes)) is not None:
        return left_out
    model = rebuilt(folder, manifest, origin)
    return judge(folder, model, Recorded.of_json(proof["prompts"]), proof["precision"], types_of(stored))


@torch.no_grad()
def rebuilt(folder: Path, manifest: Manifest, origin: Origin) -> Any:
    """The model of a checkpoint in host memory, fp32: frozen weights from its base, trained ones from the ranges."""
    assert origin.base is not None
    with torch.device("meta"):
        model: Any = build(origin.base, origin.run)
    model, weights = tuning.apply(model, origin.run.tuning, open_weights(origin.base, model), origin.run.seed)
    model.to_empty(device="cpu")
    finish_buffers(model, torch.device("cpu"))
    tensors = dict(tuning.named_tensors(model))
    for name, tensor in tensors.items():
        if name not in manifest.shapes:
            tensor.copy_(weights.read(name).view(tensor.shape))
    parts = [Shard(name, "param", tuple(tensors[name].shape), 0, tensors[name].view(-1)) for name in manifest.shapes]
    ranges.read([folder / name for name in sorted(manifest.files)], parts)
    return model.eval()
