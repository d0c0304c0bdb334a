"""Checkpoints behind training: steps go on, bytes are those of a checkpoint written at once, refusals reach all ranks.

A gate holds the writer's thread where it opens a file, for as long as the test wants; what lies on the disk meanwhile
is what a process killed there leaves.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distft.checkpoint import behind, layout
from distft.checkpoint.behind import WriteBehind
from distft.checkpoint.state import TrainState, load, save
from distft.errors import NegativeVerdict, UserMistake
from distft.loop import Agreement
from distft.strategy.base import Strategy
from distft.world import World
from tests.parity.engine import Case, prepared, run_of, train
from tests.parity.reference import Recipe, documents
from tests.parity.test_resume import flip_a_bit, largest_file
from tests.pool import Pool

ADAMW = Recipe(optimizer="adamw", lr=0.01)
SECONDS = 60.0  # far more than anything here takes


class Gate:
    """Holds threads other than the main one where they open a file of this name, until it is opened."""

    def __init__(self, name: str) -> None:
        self.name, self.reached, self.opened = name, threading.Event(), threading.Event()
        sys.addaudithook(self.audit)  # for the life of the process; an open gate does nothing

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        held = event == "open" and not self.opened.is_set() and str(args[0]).endswith(self.name)
        if held and threading.current_thread() is not threading.main_thread():
            self.reached.set()
            self.opened.wait(SECONDS)


def writer(strategy: Strategy, world: World, case: Case, folder: Path, background: object = True) -> WriteBehind:
    run = run_of(case)
    run.checkpoint.keep, run.checkpoint.background = 2, background
    return WriteBehind(run, folder, strategy, world)


def step(strategy: Strategy, world: World, case: Case, index: int) -> float:
    return train(strategy, world, case, index % len(documents()))[0]


@dataclass
class Seen:
    """What a rank saw while the second checkpoint was held, and after it."""

    losses: list[float]  # of the steps taken meanwhile
    whole_meanwhile: list[int]
    failed: bool
    whole_after: list[int]
    as_at_once: bool
    after_two_in_a_row: list[int]


def held(world: World, case: Case, folder: Path, name: str, holds: int) -> Seen:
    """Steps 1 and 2 saved behind training, the second held at file `name` of rank `holds` for two steps."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    with writer(strategy, world, case, folder / "behind") as checkpoints:
        checkpoints.save(TrainState(1))
        checkpoints.wait()
        train(strategy, world, case, 1)
        save(folder / "at-once", strategy, TrainState(2), world, keep=2, engine=case.strategy)
        gate = Gate(name)
        checkpoints.save(TrainState(2))
        losses = [step(strategy, world, case, index) for index in (2, 3)]
        if world.rank == holds:
            assert gate.reached.wait(SECONDS)
        dist.barrier()
        meanwhile, failed = layout.steps(folder / "behind"), checkpoints.failed
        if world.is_main:
            shutil.copytree(folder / "behind", folder / "killed")
        dist.barrier()
        gate.opened.set()
        checkpoints.wait()
        after = layout.steps(folder / "behind")
        files = [layout.step_folder(folder / way, 2) / layout.rank_file(world.rank) for way in ("behind", "at-once")]
        alike = files[0].read_bytes() == files[1].read_bytes()
        manifests = [layout.check(file.parent) for file in files]
        checkpoints.save(TrainState(4))
        checkpoints.save(TrainState(5))
    return Seen(losses, meanwhile, failed, after, alike and manifests[0] == manifests[1],
                layout.steps(folder / "behind"))  # fmt: skip


def uninterrupted(world: World, case: Case) -> list[float]:
    strategy = prepared(world, case)
    return [step(strategy, world, case, index) for index in range(4)]


def taken_up(world: World, case: Case, folder: Path) -> tuple[int, float]:
    """The step that a killed run goes on from, and the loss of the step after it."""
    strategy = prepared(world, case)
    state = load(folder, strategy, world, print)
    return state.step, step(strategy, world, case, state.step)


@pytest.mark.parametrize(
    ("strategy", "name", "holds", "kept"),
    [
        ("ddp", "rank-00001.safetensors", 1, 1),
        ("fsdp", "manifest.json", 0, 1),
        ("zero2", "latest.tmp", 0, 2),
    ],
)
def test_training_goes_on_while_a_checkpoint_is_written(
    pool: Callable[[int], Pool], tmp_path: Path, strategy: str, name: str, holds: int, kept: int
) -> None:
    case = Case(strategy, 1, ADAMW)
    losses = pool(2).run(uninterrupted, case)[0]
    for seen in pool(2).run(held, case, tmp_path, name, holds):
        assert seen.losses == losses[2:]
        assert not seen.failed
        assert seen.whole_meanwhile == list(range(1, kept + 1))
        assert seen.whole_after == [1, 2]
        assert seen.as_at_once
        assert seen.after_two_in_a_row == [4, 5]
    assert len(list((tmp_path / "killed" / "checkpoints").glob("step-*.tmp-*"))) == 2 - kept
    assert pool(2).run(taken_up, case, tmp_path / "killed")[0] == (kept, losses[kept])


def last_one(world: World, case: Case, folder: Path) -> tuple[int, list[int], int, bool]:
    """Copies held after a checkpoint behind training; what is complete when the last one returns, the copies then, and
    whether it holds what a checkpoint written at once does."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    with writer(strategy, world, case, folder / "behind") as checkpoints:
        checkpoints.save(TrainState(1))
        copies = len(checkpoints.buffers)
        train(strategy, world, case, 1)
        save(folder / "at-once", strategy, TrainState(2), world, keep=2, engine=case.strategy)
        checkpoints.save(TrainState(2), last=True)
        whole, left = layout.steps(folder / "behind"), len(checkpoints.buffers)
    files = [layout.step_folder(folder / way, 2) / layout.rank_file(world.rank) for way in ("behind", "at-once")]
    return copies, whole, left, files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_the_last_one_takes_no_copy(pool: Callable[[int], Pool], tmp_path: Path, strategy: str) -> None:
    for copies, whole, left, alike in pool(2).run(last_one, Case(strategy, 1, ADAMW), tmp_path):
        assert copies > 0
        assert (whole, left) == ([1, 2], 0)
        assert alike


def refused(world: World, case: Case, folder: Path) -> tuple[list[bool], str, list[int], float]:
    """The second checkpoint cannot be written by rank 1: when all ranks know, what is told, and what is left."""
    strategy = prepared(world, case)
    agreement = Agreement(world, num_flags=1)
    checkpoints = writer(strategy, world, case, folder)
    checkpoints.save(TrainState(1))
    checkpoints.wait()
    answers, told = [], ""
    with largest_file(4096 if world.rank == 1 else -1):
        checkpoints.save(TrainState(2))
        assert checkpoints.thread is not None
        checkpoints.thread.join(SECONDS)
    for index in (0, 1):
        train(strategy, world, case, index)
        answers += agreement.ask(checkpoints.failed)
    try:
        checkpoints.wait()
    except UserMistake as mistake:
        told = str(mistake)
    checkpoints.save(TrainState(3))  # a later one is not spoilt by it
    checkpoints.wait()
    return answers, told, layout.steps(folder), train(strategy, world, case, 2)[0]


def test_a_disk_that_refuses_is_told_on_every_rank_at_the_same_step(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    for answers, told, left, loss in pool(2).run(refused, Case("ddp", 1, ADAMW), tmp_path):
        assert answers == [False, True]
        assert "rank 1" in told
        assert "Free space" in told
        assert left == [1, 3]
        assert loss == loss


def lost(world: World, case: Case, folder: Path, damaged: bool, background: bool) -> None:
    """The first checkpoint; the disk loses a bit of it before it is read again."""
    strategy = prepared(world, case)
    train(strategy, world, case, 0)
    gate = Gate(layout.LATEST + ".tmp")
    checkpoints = writer(strategy, world, case, folder, background)
    harm = threading.Thread(target=lambda: (gate.reached.wait(SECONDS), damage(folder, damaged), gate.opened.set()))
    harm.start()
    try:
        checkpoints.save(TrainState(1))
        checkpoints.wait()
    finally:
        gate.reached.set()
        harm.join()


def damage(folder: Path, damaged: bool) -> None:
    if damaged:
        flip_a_bit(layout.step_folder(folder, 1) / layout.rank_file(0))


@pytest.mark.parametrize("background", [True, False])
def test_the_first_one_is_read_again_and_compared(
    pool: Callable[[int], Pool], tmp_path: Path, background: bool
) -> None:
    case = Case("ddp", 1, ADAMW)
    pool(1).run(lost, case, tmp_path / "good", False, background)
    with pytest.raises(NegativeVerdict, match="of rank 0"):
        pool(1).run(lost, case, tmp_path / "bad", True, background)


def test_copies_are_made_where_host_memory_holds_them(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "cgroup"
    (groups / "job" / "task").mkdir(parents=True)
    own.write_text("0::/job/task\n")
    free = behind.available_memory(groups, own)
    assert free > 1 << 20
    for folder, limit in ((groups / "job", str(3 << 20)), (groups / "job" / "task", "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(2 << 20))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 19}\nactive_file {1 << 18}\n")
    assert behind.available_memory(groups, own) == (3 << 20) - (2 << 20) + (1 << 19) + (1 << 18)
    assert behind.fits_beside([])
    huge = torch.empty(1 << 46, device="meta")
    assert not behind.fits_beside([behind.Shard("weight", "param", (1 << 46,), 0, huge)])
