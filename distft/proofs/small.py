"""A run in small: its own words, model and rows, cut down to what takes seconds."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from distft.config.schema import (
    Batch,
    Checkpoint,
    EarlyStopping,
    Evaluation,
    Guard,
    Launch,
    Log,
    Run,
    RunFolder,
    Source,
    TinyShape,
)
from distft.config.schema.check import Check
from distft.errors import UserMistake

BINS = 6  # a step: can be split by 1, 2, 3 and unevenly by 4
ROWS_READ, ROWS_TAKEN = 512, 64  # of each source; the shortest of those that are read
LARGEST = 60_000_000  # parameters of a model that is tried as it is
LORA_RATE = 5e-3  # at least: adapters begin by doing nothing and have a few steps to do something
STALL_SECONDS = 120.0
INDIVISIBLE = ("pdrop", "_drop", "router_aux_loss_coef")  # endings of settings
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # endings of files


@dataclass(frozen=True)
class TrialModel:
    """The model of the trials."""

    folder: Path
    name: str  # what the user calls it
    num_parameters: int  # of the user's model
    is_copy: bool  # a small copy with random weights


def trial_model(folder: Path, run: Run, full: Any, out: Path) -> TrialModel:
    """The model in `folder` itself, or a small copy of it in `out`, as `check.full` says.

    Raises:
        UserMistake: no small copy can be made.
    """
    from distft.model.folder import num_parameters

    size = num_parameters(folder)
    name = folder.name if run.model.name == "hf" else "the tiny model"
    if full is True or (full == "auto" and size <= LARGEST):
        return TrialModel(folder, name, size, is_copy=False)
    write_copy(folder, run, out)
    return TrialModel(out, name, size, is_copy=True)


def write_copy(folder: Path, run: Run, out: Path) -> None:
    """A model folder with a miniature of the model in `folder`, with its tokenizer and its whole vocabulary."""
    import torch

    from distft.model.folder import read_config
    from distft.model.miniature import miniature

    trust = run.model.trust_remote_code
    config = read_config(folder, trust)
    small = miniature(config, trust, keep_words=True)
    if small is None:
        raise UserMistake(
            f"model.path={folder}: no small copy of this model can be made. Set check.full=true to take it as it is."
        )
    dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    stored: Any = copy.deepcopy(small).to(dtype)  # in the types that the model's own weights have on disk
    stored.save_pretrained(out)
    for path in folder.iterdir():
        is_weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def divisible(folder: Path, out: Path) -> Path:
    """A folder with the same model and nothing by which the division of a step decides its loss: no dropout, no
    balancing of a mixture's experts. `folder` itself where it has neither."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not indivisible(values):
        return folder
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json":
            try:
                os.link(path.resolve(), out / path.name)
            except OSError:  # another file system
                shutil.copyfile(path, out / path.name)
    for section, name in indivisible(values):
        section[name] = 0.0
    (out / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    return out


def indivisible(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every share of dropout, and every weight of a balancing loss, above 0 in a model's configuration: the section
    that holds it, and its name there."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += indivisible(value)
        elif isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith(INDIVISIBLE)):
            found.append((values, name))
    return found


def sample_rows(run: Run, out: Path) -> list[Source]:
    """Some rows of each of the run's sources as JSON lines in `out`: the shortest of the first ones.

    Raises:
        UserMistake: a source cannot be read.
    """
    from distft.data.rows import Row
    from distft.data.sources import SourceSpec, read_rows, sources_of

    def rows_of(spec: SourceSpec) -> Iterator[str]:
        for row in read_rows(spec):
            if isinstance(row, Row):
                yield json.dumps(row.value, default=str, ensure_ascii=False)

    out.mkdir()
    sources = []
    for number, spec in enumerate(sources_of(run.data, run.objective.name)):
        lines = sorted(islice(rows_of(spec), ROWS_READ), key=len)[:ROWS_TAKEN]
        path = out / f"{number}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        given = run.data.sources[number].columns if run.data.sources else run.data.columns
        sources.append(Source(path=str(path), name=spec.name, weight=spec.weight, format="jsonl", columns=given))
    return sources


def in_small(run: Run, check: Check, model: TrialModel, sources: list[Source], cache: Path) -> Run:
    """The run as it is tried on one rank: everything that decides how a step is computed stays as it is."""
    small = Run(**{field.name: copy.deepcopy(getattr(run, field.name)) for field in fields(Run)})
    small.model = replace(small.model, name="hf", path=str(model.folder), revision=None, tiny=TinyShape())
    small.data = replace(
        small.data,
        path=None,
        format="auto",
        columns={},
        exclude_ids=None,
        subset=None,
        split="train",
        sources=sources,
        eval_path=None,
        eval_split="test",
        eval_fraction=0.0,
        sequence_length=min(run.data.sequence_length, check.sequence_length),
        too_long="auto",
        max_rejected=1.0,
        workers=1,
        cache_dir=str(cache),
    )
    small.batch = Batch(global_size=BINS, micro_size=1)
    small.schedule = replace(small.schedule, warmup=0.0)
    if run.tuning.method == "lora":
        small.optim = replace(small.optim, lr=max(run.optim.lr, LORA_RATE))
    small.eval = Evaluation(at_start=False, samples=0)
    # At most three come, of which the first is begun from again: none may go.
    small.checkpoint = Checkpoint(every=check.steps // 2, keep=4, background=run.checkpoint.background)
    small.early_stopping, small.guard = EarlyStopping(), Guard(stall_seconds=STALL_SECONDS)
    small.launch, small.log, small.run = Launch(ranks=1), Log(tracker="none", every=1), RunFolder()
    small.epochs, small.max_steps, small.resume, small.resume_allow = 1.0, check.steps, "never", []
    return small


def on_ranks(run: Run, size: int, micro_size: int = 1) -> Run:
    """The same run on another number of ranks, or with another micro-batch."""
    changed = copy.deepcopy(run)
    changed.launch.ranks, changed.batch.micro_size = size, micro_size
    if size == 1:  # one rank has nobody to share with
        changed.strategy.shard_size = "auto"
        if not isinstance(changed.strategy.reshard_after_forward, bool):
            changed.strategy.reshard_after_forward = "auto"
    return changed


def divided(run: Run, folder: Path) -> Run:
    """The same run without dropout in its adapters, on the model in `folder` (see `divisible`)."""
    changed = copy.deepcopy(run)
    changed.model.path, changed.tuning.lora_dropout = str(folder), 0.0
    return changed
