"""Packing isolation: a document's logits do not depend on what else lies in its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distft.config.schema import Batch as BatchConfig
from distft.config.schema import Run
from distft.model.miniature import experts_of
from distft.prepared import Prepared
from distft.proofs.outcome import Outcome, failed
from distft.proofs.small import BINS

if TYPE_CHECKING:
    from distft.data.batch import Batch
    from distft.strategy.base import Strategy
    from distft.world import World

POSITIONS = 256  # at which logits are compared
ALONE = {"fp32": 1e-4, "bf16": 0.1}  # of the largest logit: a row of another length sums in another order


@contextmanager
def alone(run: Run, prepared: Prepared, precision: str) -> Iterator[tuple[Strategy, World]]:
    """The trainee of a run as a world of one rank has it, without dropout."""
    from distft.model import adapters, kernels, tuning
    from distft.model.load import blocks, build
    from distft.model.mapping import open_weights
    from distft.objective.trainee import Trainee
    from distft.optim import make_optimizer
    from distft.strategy import make_strategy
    from distft.world import join, leave

    single = replace(run, strategy=replace(run.strategy, name="ddp", communication="fp32"))
    folder = Path(prepared.model_folder)
    world = join()
    try:
        strategy = make_strategy(single, world, precision)
        with strategy.born():
            model = build(folder, run, prepared.attention)
        model, weights = tuning.apply(model, run.tuning, open_weights(folder, model), run.seed)
        layers = blocks(model)
        adapters.apply(model, run.model.compile)
        if not run.model.compile:
            kernels.apply(model, run.model.kernels, world.device)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        strategy.prepare(Trainee(model), layers, weights, partial(make_optimizer, shapes=shapes, optim=run.optim))
        strategy.trainee.eval()
        yield strategy, world
    finally:
        leave()


def prove(run: Run, prepared: Prepared, precision: str) -> Outcome:
    """Edit one document of a micro-batch of the run's own rows: the others' logits must keep every bit.

    Each document's logits must also be those that it gets alone in its row, to rounding.
    """
    from distft.data.batches import Plan
    from distft.data.cache import open_prepared

    sources = open_prepared(Path(prepared.data_folder)).train
    layout = "in one row" if prepared.packed else "one a row"
    batch_config = BatchConfig(global_size=BINS, micro_size=BINS)
    length = run.data.sequence_length
    batch = Plan(sources, batch_config, length, run.seed, prepared.packed, 0, 1).step(0).micro_batches[0]
    compared = f"one of {len(batch.lengths)} documents {layout} edited"
    if len(batch.lengths) < 2:
        return failed("packing", compared, "a second document is needed", 0)
    with alone(run, prepared, precision) as (strategy, world):
        vocabulary = strategy.trainee.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        changed, total, largest = edited(strategy, batch.to(world.device), vocabulary)
        # How many tokens an expert gets decides the shapes of its products, and shapes decide the order of sums.
        exact = experts_of(strategy.trainee.config) < 2
        off = apart_from_alone(strategy, batch.to(world.device)) if prepared.packed else 0.0
    seen = f"{changed:,} of {total:,} logits of the others changed"
    if prepared.packed:
        seen += f", and alone in its row a document's are {off:.1g} away"
    value, bound = (changed, 0.0) if exact else (largest, ALONE[precision])
    if not exact:
        seen += f", by {largest:.1g} at most (a mixture of experts)"
    passed = value <= bound and total > 0 and off <= ALONE[precision]
    return Outcome("packing", compared, seen, value, bound, passed)


def edited(strategy: Strategy, batch: Batch, vocabulary: int) -> tuple[int, int, float]:
    """How many logits of the other documents change when the first and when the last is edited, of how many, and by
    how much of the largest logit at most."""
    documents = spans(batch)
    every = torch.cat([span for _, span in documents])
    positions = every[torch.linspace(0, len(every) - 1, min(POSITIONS, len(every))).long()].to(batch.input_ids.device)
    before = logits_at(strategy, batch, positions)
    changed, total, largest = 0, 0, 0.0
    for _, span in (documents[0], documents[-1]):
        inside = span.to(positions.device)
        ids = batch.input_ids.flatten().clone()
        ids[inside] = vocabulary - 1 - ids[inside]
        after = logits_at(strategy, replace(batch, input_ids=ids.view_as(batch.input_ids)), positions)
        others = ~torch.isin(positions, inside)
        changed += int((before[others].view(torch.int32) != after[others].view(torch.int32)).sum())
        total += before[others].numel()
        if others.any():
            moved = (before[others] - after[others]).abs().max() / before.abs().max().clamp_min(1e-12)
            largest = max(largest, float(moved))
    return changed, total, largest


def apart_from_alone(strategy: Strategy, batch: Batch) -> float:
    """Largest difference to the logits of a document alone in its row, of the first and the last, relative."""
    from distft.objective.trainee import LogitsRequest

    worst = 0.0
    for length, span in (spans(batch)[0], spans(batch)[-1]):
        positions = span.to(batch.input_ids.device)[-POSITIONS // 2 :]
        packed = logits_at(strategy, batch, positions)
        ids = batch.input_ids[:, span[0] : span[0] + length]
        own = positions - int(span[0])
        with torch.no_grad():
            single = strategy.forward(LogitsRequest(ids, torch.arange(length, device=ids.device)[None], None, own))
        assert isinstance(single, Tensor)
        worst = max(worst, float((packed - single).abs().max() / single.abs().max().clamp_min(1e-12)))
    return worst


def logits_at(strategy: Strategy, batch: Batch, positions: Tensor) -> Tensor:
    """[n, vocabulary] of a micro-batch, as a training pass computes them."""
    from distft.objective.trainee import LogitsRequest

    request = LogitsRequest(batch.input_ids, batch.position_ids, batch.attention_mask, positions, packed=batch)
    with torch.no_grad():
        logits = strategy.forward(request)
    assert isinstance(logits, Tensor)
    return logits


def spans(batch: Batch) -> list[tuple[int, Tensor]]:
    """Length and flat positions of every document."""
    if batch.cu_seqlens is not None:
        starts = batch.cu_seqlens.tolist()[:-1]
    else:
        starts = [row * batch.input_ids.shape[1] for row in range(len(batch.lengths))]
    return [(length, torch.arange(start, start + length)) for start, length in zip(starts, batch.lengths, strict=True)]
