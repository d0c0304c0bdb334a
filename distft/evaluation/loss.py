"""Loss on held-out rows, as a token mean over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from distft import heartbeat
from distft.objective.trainee import LossRequest, LossSums
from distft.world import World, sum_over

if TYPE_CHECKING:
    from distft.data.batch import Step
    from distft.strategy.base import Strategy


def evaluate(strategy: Strategy, steps: Iterable[Step], world: World, source_names: Sequence[str]) -> dict[str, float]:
    """Evaluate the weights as they are.

    Returns `loss` (token mean over all sources), `source/<name>/loss` for each source that has supervised tokens when
    there is more than one, and `supervised_tokens`. Collective: every rank runs the same number of forward passes.
    """
    num_sources = len(source_names)
    sums = torch.zeros(2, num_sources, dtype=torch.float64)
    strategy.trainee.eval()
    with torch.no_grad():
        for step in steps:
            for batch in step.micro_batches:
                heartbeat.beat()
                answer = strategy.forward(LossRequest(batch.to(world.device), 1.0, num_sources=num_sources))
                assert isinstance(answer, LossSums)
                sums += torch.stack([answer.nll, answer.counts]).cpu().double()
    strategy.trainee.train()
    nll, counts = sum_over(world, sums)
    record = {"loss": float(nll.sum() / counts.sum()), "supervised_tokens": float(counts.sum())}
    if num_sources > 1:
        for name, source_nll, count in zip(source_names, nll, counts, strict=True):
            if count > 0:
                record[f"source/{name}/loss"] = float(source_nll / count)
    return record
