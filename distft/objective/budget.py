"""`activation.budget`: which blocks are checkpointed so that the largest micro-batch fits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from distft.config.schema import Run
from distft.data.batch import Batch
from distft.errors import UserMistake
from distft.model.activation import enable
from distft.model.footprint import Footprint, Numbers, fewest, measure, peak
from distft.objective.trainee import LossRequest, LossSums, Trainee

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from distft.data.batches import Plan

GIB = 2**30


class Checkpointed(NamedTuple):
    """What `activation` comes to for a model."""

    mode: str
    blocks: list[nn.Module]
    notes: tuple[str, ...] = ()  # what the user should know


class Shape(NamedTuple):
    """Of a micro-batch: [rows, columns] tokens; a packed one has a single row of several documents."""

    rows: int
    columns: int
    packed: bool


def choose(
    trainee: Trainee, blocks: list[nn.Module], run: Run, plan: Plan, device: torch.device, numbers: Numbers
) -> Checkpointed:
    """Every block by `activation.mode`, or with a budget the fewest that make the largest micro-batch of `plan` fit.

    trainee: adapters and kernels in place, nothing checkpointed or compiled yet.

    Raises:
        UserMistake: the budget is too small, or what this model keeps cannot be counted.
    """
    mode, budget = run.activation.mode, run.activation.budget
    if budget is None:
        return Checkpointed(mode, blocks)
    modes = [mode] if mode != "none" else ["full"] if run.model.compile else ["selective", "full"]
    shape = largest(plan)
    plain = footprint(trainee, blocks, "none", shape, device, numbers)
    for mode in modes:
        again = footprint(trainee, blocks, mode, shape, device, numbers)
        choice = fewest(plain, again, budget * GIB)
        if choice is None:
            continue
        number = len(choice.blocks)
        what = f"{number} of {len(blocks)} blocks are checkpointed ({mode})" if number else "No block is checkpointed"
        note = f"{what}: {choice.peak / GIB:.3g} of {budget:g} GiB (activation.budget)"
        return Checkpointed(mode, [blocks[index] for index in choice.blocks], (note,))
    needed = peak(plain, again, range(len(blocks))) / GIB
    cure = "activation.mode=full, " if mode != "full" else ""
    digits = 2 - math.floor(math.log10(needed))
    raise UserMistake(
        f"activation.budget={budget:g} cannot be met: with every block checkpointed ({mode}) a micro-batch of "
        f"{shape.rows * shape.columns:,} tokens still keeps {needed:.3g} GiB for its backward pass. Set {cure}"
        f"activation.budget={math.ceil(needed * 10**digits) / 10**digits:g} or more, or lower batch.micro_size or "
        "data.sequence_length."
    )


def largest(plan: Plan) -> Shape:
    """Of this rank's micro-batches. One document a row: as the first epoch's bins are."""
    size = min(plan.batch.micro_size, -(-plan.batch.global_size // plan.data_size))
    most = plan.batch.pass_tokens
    if plan.packed:
        tokens = size * plan.sequence_length
        if most is not None:
            longest = max(int(np.asarray(source.lengths).max(initial=2)) for source in plan.sources)
            tokens = min(tokens, max(most, longest))
        return Shape(1, tokens, True)
    num_rows, columns = [0], 0
    for index, source in enumerate(plan.sources):
        bins = plan.bins(index, 0)
        num_rows += np.diff(bins.starts).tolist()
        columns = max(columns, int(np.asarray(source.lengths)[bins.items].max(initial=2)))
    rows = sum(sorted(num_rows)[-size:])
    return Shape(rows if most is None else min(rows, max(1, most // columns)), columns, False)


def footprint(
    trainee: Trainee, blocks: list[nn.Module], mode: str, shape: Shape, device: torch.device, numbers: Numbers
) -> Footprint:
    """What one micro-batch keeps, every token of it supervised, with all of `blocks` checkpointed by `mode`."""

    def run(empty: Callable[..., Tensor]) -> LossSums:
        trainee.train()
        enable(trainee.model, blocks, mode)
        answer = trainee(LossRequest(batch_of(shape, empty), scale=1.0))
        assert isinstance(answer, LossSums)
        return answer

    try:
        return measure(trainee, blocks, run, device, numbers)
    except Exception as error:  # models may raise anything where values decide what they do
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserMistake(
            f"activation.budget: what this model keeps cannot be counted ahead ({reason}). Leave it out and set "
            "activation.mode."
        ) from error


def batch_of(shape: Shape, empty: Callable[..., Tensor]) -> Batch:
    """A micro-batch of this shape; packed: of two documents, since one alone would be laid out as a row of its own."""
    rows, columns, packed = shape
    lengths = (columns - columns // 2, columns // 2) if packed else (columns,) * rows
    num_supervised = rows * columns - len(lengths)
    return Batch(
        input_ids=empty(rows, columns, dtype=torch.int64),
        position_ids=empty(rows, columns, dtype=torch.int64),
        attention_mask=None if packed else empty(rows, columns, dtype=torch.bool),
        cu_seqlens=empty(len(lengths) + 1, dtype=torch.int32) if packed else None,
        max_length=max(lengths),
        positions=empty(num_supervised, dtype=torch.int64),
        targets=empty(num_supervised, dtype=torch.int64),
        sources=empty(num_supervised, dtype=torch.int64),
        num_tokens=rows * columns,
        lengths=lengths,
    )
