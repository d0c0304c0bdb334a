"""Logits computed anew, against those that were recorded when a model was saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from distft.model.plain import load_plain
from distft.model.probe import NOISE, TOLERANCE, Recorded, logits_of
from distft.model.subject import NOT_OURS, Subject
from distft.weights.findings import Finding
from distft.weights.store import FolderWeights, Weights, num_elements

GIB = 1024**3
BYTES = {"fp32": 4, "bf16": 2}


def logits(subject: Subject) -> Iterator[Finding]:
    """What plain transformers or PEFT computes for the recorded prompts, against what was when it was saved."""
    recorded = subject.proof.recorded() if subject.proof else None
    if recorded is None or subject.proof is None:
        yield Finding("logits", None, NOT_OURS if subject.proof is None else "none were recorded")
        return
    if subject.damaged:
        yield Finding("logits", None, "the model is not built from damaged files")
        return
    base = subject.base() if subject.is_adapter else None
    if base is not None and base[1] is None:
        yield Finding("logits", None, f"its base {base[0]} is not on this machine")
        return
    precision = subject.proof.precision
    holds: list[Weights] = [subject.weights(), *([FolderWeights(base[1])] if base and base[1] else [])]
    if (left_out := too_large(holds, precision, subject.max_bytes)) is not None:
        yield left_out
        return
    model = load_plain(subject.folder, precision, subject.device, subject.trust_remote_code)
    yield judge(subject.folder, model, recorded, precision, [dtype for part in holds for dtype in types_of(part)])


def too_large(parts: Iterable[Weights], precision: str, max_bytes: float) -> Finding | None:
    """That logits are left out, where a model of these weights needs more memory than it may take."""
    needed = BYTES[precision] * sum(num_elements(part.shape(name)) for part in parts for name in part.names())
    if needed <= max_bytes:
        return None
    return Finding(
        "logits", None, f"the model needs {size(needed)} of memory, verify.max_memory allows {size(max_bytes)}"
    )


def size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 1024**2:.2f} MiB"


def types_of(stored: Weights) -> set[torch.dtype]:
    return {stored.dtype(name) for name in stored.names()}


def judge(where: Path, model: Any, recorded: Recorded, precision: str, types: Iterable[torch.dtype]) -> Finding:
    """The logits of `model`, of which a PEFT one must also differ from its own base where the trainer's did.

    `precision`: what the recorded logits were computed in. `types`: of the stored tensors; rounding decides what is
    tolerated.
    """
    low = precision == "bf16" or any(dtype in (torch.bfloat16, torch.float16) for dtype in types)
    tolerance, noise = TOLERANCE["bf16" if low else "fp32"], NOISE["bf16" if low else "fp32"]
    difference = recorded.distance(logits_of(model, recorded))
    if not difference <= tolerance:
        return Finding(
            "logits",
            False,
            f"{where}: loaded without an engine, its logits differ from the trainer's by {difference:.2g} of "
            f"their spread, more than {tolerance:g}. It is not the model that was trained.",
        )
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            untrained = recorded.distance(logits_of(model, recorded))
        if difference > max(noise, untrained / 2):
            return Finding(
                "logits",
                False,
                f"{where}: its logits are {difference:.2g} of their spread from the trainer's, the base model's "
                f"{untrained:.2g}. The adapters do not do what they did in training.",
            )
    count = f"{recorded.positions.numel()} positions of {recorded.input_ids.shape[0]} prompts"
    said = f"{difference:.1g} of their spread from the trainer's at {count} ({tolerance:g} is allowed)"
    return Finding("logits", True, said, difference)
