"""Resume equality: steps with a save and a fresh start between them end as the same steps without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from distft.checkpoint import layout
from distft.checkpoint.layout import Damaged, Manifest
from distft.proofs.outcome import Outcome, failed
from distft.proofs.trial import Trial

LOGGED = ("loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "skipped")


def prove(whole: Trial, resumed: Trial, failures: Mapping[str, str]) -> Outcome:
    """`resumed` began from the checkpoint in the middle of `whole`: same numbers logged, same bits in the last one."""
    steps = int(whole.run.max_steps or 0)
    half = int(whole.run.checkpoint.every)
    ranks = f"{whole.size} rank{'s' if whole.size > 1 else ''}"
    compared = f"{steps} steps on {ranks} with {half}, a save, new processes and {steps - half}"
    reasons = [failures[trial.folder.name] for trial in (whole, resumed) if failures[trial.folder.name]]
    if reasons:
        return failed("resume", compared, reasons[0], 0)
    try:
        differing, total = differing_values(*(layout.step_folder(trial.folder, steps) for trial in (whole, resumed)))
    except Damaged as error:
        return failed("resume", compared, str(error), 0)
    where = logged_apart(whole, resumed, half)
    seen = f"{differing:,} of {total:,} values of weights and moments differ" + (f"; {where}" if where else "")
    return Outcome("resume", compared, seen, differing, 0, passed=differing == 0 and total > 0 and not where)


def logged_apart(whole: Trial, resumed: Trial, half: int) -> str:
    """The first number that was logged otherwise; empty where there is none."""
    wanted = [record for record in whole.records() if record["step"] > half]
    found = resumed.records()
    if not wanted or [record["step"] for record in wanted] != [record["step"] for record in found]:
        return f"steps {[record['step'] for record in found]} were made of {[record['step'] for record in wanted]}"
    for mine, theirs in zip(wanted, found, strict=True):
        for name in LOGGED:
            if mine[name] != theirs[name]:
                return f"{name} of step {mine['step']} was {mine[name]}, is {theirs[name]}"
    return ""


def differing_values(one: Path, other: Path) -> tuple[int, int]:
    """Values of all ranks' files whose bits differ between two checkpoints, and how many there are.

    Raises:
        Damaged: one of them is not whole.
    """
    manifests = [layout.check(folder) for folder in (one, other)]
    differing = total = 0
    for mine, theirs in pairs(one, other, *manifests):
        total += mine.numel()
        same_shape = mine.shape == theirs.shape
        differing += int((mine.view(torch.int32) != theirs.view(torch.int32)).sum()) if same_shape else mine.numel()
    return differing + sum(cursor_apart(*manifests)), total


def cursor_apart(one: Manifest, other: Manifest) -> Iterator[int]:
    """1 for each part of the state that decides what comes next and is not the same."""
    for name in ("step", "num_updates", "cursor", "source_tokens", "source_supervised"):
        yield int(one.state.get(name) != other.state.get(name))


def pairs(one: Path, other: Path, mine: Manifest, theirs: Manifest) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of both checkpoints by file and name; an empty one stands for one that is missing."""
    empty = torch.zeros(0)
    for name in sorted({*mine.files, *theirs.files}):
        if name not in mine.files or name not in theirs.files:
            raise Damaged(f"{name} is in one of {one} and {other} alone")
        with safe_open(one / name, "pt") as first, safe_open(other / name, "pt") as second:
            keys, others = list(first.keys()), set(second.keys())
            for key in keys:
                yield first.get_tensor(key), second.get_tensor(key) if key in others else empty
            for key in others - set(keys):
                yield second.get_tensor(key), empty
