"""Whole runs inside a pool of ranks: what `distft train` does once a rank has its configuration, without its start."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from distft.config.check import check, settle
from distft.config.load import compose
from distft.config.schema import Run
from distft.log import Log
from distft.objective.trainee import LossRequest
from distft.verbs.preflight import preflight
from distft.verbs.train import Job
from distft.world import World

Documents = list[tuple[tuple[int, int], ...]]  # by micro-batch: (source, row) of its documents


def run_of(words: list[str]) -> Run:
    run = compose(words).run
    assert check(run) == []
    return settle(run)


def assembled(world: World, run: Run, run_dir: Path) -> Job:
    """Preflight by rank 0 where it has not been done, then the rooms of the run."""
    if world.is_main and not (run_dir / "prepared.json").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        preflight(run, run_dir)
    torch.distributed.barrier()
    return Job.assemble(run, run_dir, world)


def recorded(job: Job, state: Any) -> dict[int, Documents]:
    """The sample ids that this rank's model is really given in training, by step (from 0)."""
    seen: dict[int, Documents] = defaultdict(list)
    forward = job.strategy.forward

    def through(request: Any) -> Any:
        if isinstance(request, LossRequest) and torch.is_grad_enabled():
            seen[state.step].append(request.batch.documents)
        return forward(request)

    job.strategy.forward = through  # type: ignore[method-assign]
    return seen


def trained(world: World, run: Run, run_dir: Path) -> dict[int, Documents]:
    """A run, or the rest of one, to its end. Returns this rank's sample ids."""
    job = assembled(world, run, run_dir)
    state, resumed = job.restore()
    seen = recorded(job, state)
    with Log(run, run_dir, world, job.num_steps, resumed, None) as log:
        job.train(state, log, lambda: [False, False, False])  # type: ignore[arg-type]
    return dict(seen)
