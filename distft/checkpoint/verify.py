"""Whether a checkpoint is what was saved: looked over without an engine and without the ranks that wrote it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distft.checkpoint import layout
from distft.checkpoint.behind import available_memory
from distft.checkpoint.layout import Damaged, Manifest
from distft.checkpoint.ranges import wrong_files
from distft.config.schema import Run
from distft.config.snapshot import read_snapshot
from distft.errors import Stop
from distft.model import tuning
from distft.model.foreign import check_model
from distft.model.load import build
from distft.model.logits import GIB
from distft.model.mapping import open_weights
from distft.model.proof import weight_hashes
from distft.model.verify import PIECE, effect
from distft.prepared import Prepared
from distft.weights.findings import Finding

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
    checks = {
        "ranges": lambda: whole(folder, manifest),
        "names and shapes": lambda: keys(manifest, Origin.of(folder, trust_remote_code)),
        "base": lambda: base_files(manifest, Origin.of(folder, trust_remote_code)),
    }
    for what, check in checks.items():
        try:
            findings += check()
        except (Stop, Damaged, SafetensorError) as error:
            findings.append(Finding(what, False, str(error)))
    return findings


def whole(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """The ranks' ranges make up every parameter and moment exactly, hold numbers, and adapters do something."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    wrong, values, not_zero = [], 0, set()
    for name in sorted(manifest.files):
        with safe_open(folder / name, framework="pt") as file:
            index = json.loads((file.metadata() or {}).get("index", "{}"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key not in index:
                    raise Damaged(f"{folder / name} holds {key}, which its own index does not name")
                stored = file.get_slice(key)
                [length] = stored.get_shape()
                ranges.setdefault(key, []).append((int(index[key][0]), length))
                values += length
                is_zero, is_finite = look_through(stored, length)
                if not is_finite:
                    wrong.append(f"{folder / name}: {key} holds values that are no numbers (nan or infinity)")
                if not is_zero:
                    not_zero.add(key)
    for parameter, shape in manifest.shapes.items():
        for kind in manifest.kinds:
            reached = 0
            for start, length in sorted(part for part in ranges.get(f"{kind}/{parameter}", []) if part[1]):
                reached = reached + length if start == reached else -1
                if reached < 0:
                    break
            if reached != math.prod(shape):
                wrong.append(f"{folder}: the ranges of {kind}/{parameter} do not make up its shape {shape}")
    said = f"{len(manifest.shapes)} parameters, {values:,} values with their moments"
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
