"""Names and shapes of a finished folder against the base that it belongs to, from headers and a model on meta."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distft.errors import NegativeVerdict
from distft.model.foreign import check_model
from distft.model.load import build
from distft.model.mapping import open_weights
from distft.model.plain import quiet
from distft.model.subject import Subject
from distft.weights.findings import Finding
from distft.weights.store import FolderWeights, Weights


def keys(subject: Subject) -> Iterator[Finding]:
    """Names and shapes against the base: of an adapter against the base's layers, of a model against its architecture
    and, where the base it was trained from is there, against that."""
    if subject.damaged:
        return
    if subject.is_adapter:
        name, base = subject.base()
        if base is None:
            yield Finding("names and shapes", None, f"its base {name} is not on this machine")
            return
        compare("adapter", shapes_of(subject.weights()), adapter_shapes(subject, base), subject.folder, base)
        yield Finding("names and shapes", True, f"those that PEFT gives this adapter on {base}")
        return
    with torch.device("meta"):
        model = build(subject.folder, subject.run())
    open_weights(subject.folder, model)
    path = Path(str((subject.proof.base if subject.proof else {}).get("path", "")))
    if (path / "config.json").exists():
        check_model(path, subject.trust_remote_code)
        compare("model", shapes_of(subject.weights()), shapes_of(FolderWeights(path)), subject.folder, path)
        yield Finding("names and shapes", True, f"those of {type(model).__name__} and of its base {path}")
    else:
        yield Finding("names and shapes", True, f"those of {type(model).__name__}; its base is not known here")


def shapes_of(stored: Weights) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape(name) for name in stored.names()}


def compare(
    kind: str, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], folder: Path, base: Path
) -> None:
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise NegativeVerdict(
                f"{folder}: {name} has the shape {list(found.get(name, ())) if name in found else 'none (missing)'}, "
                f"but on its base {base} it has {list(wanted[name]) if name in wanted else 'no such name'}: the {kind} "
                "belongs to another base."
            )


def adapter_shapes(subject: Subject, base: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes that PEFT's configuration gives the adapter on its base, built on meta."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    importlib.import_module("torch.distributed.tensor")  # PEFT looks there and does not import it
    check_model(base, subject.trust_remote_code)
    with torch.device("meta"):
        model: Any = build(base, subject.run())
    try:
        with quiet():
            wrapped = get_peft_model(model, PeftConfig.from_pretrained(str(subject.folder)), low_cpu_mem_usage=True)
    except ValueError as error:
        text = " ".join(str(error).split())[:300]
        raise NegativeVerdict(f"{subject.folder}: the adapter does not fit its base {base}: {text}") from None
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
