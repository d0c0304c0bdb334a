"""Saves and evaluations cost no memory and no open files: not while one is written, and not after a thousand."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from distft.checkpoint import layout, ranges
from distft.checkpoint.behind import WriteBehind
from distft.checkpoint.state import TrainState, owned
from distft.config.schema import Run
from distft.errors import NegativeVerdict
from distft.evaluation.loss import evaluate
from distft.world import World
from tests.faults.jobs import assembled, run_of
from tests.faults.runs import Shop
from tests.parity.engine import Case, prepared, train
from tests.parity.engine import run_of as case_run
from tests.parity.reference import Recipe
from tests.parity.test_behind import taken_up
from tests.parity.test_resume import flip_a_bit
from tests.pool import Pool
from tests.required import cannot

ROW = "two launches on one folder; the port taken; 1,000 evaluations and saves in a row"
MIB = 1 << 20


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@dataclass
class Peak:
    """The most that `anonymous` was while it was watched, over what it was before."""

    before: int = field(default_factory=anonymous)
    most: int = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.is_set():
                self.most = max(self.most, anonymous() - self.before)
                time.sleep(0.001)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


# --- many of them -----------------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """Of a process: memory, open files and threads after some of the rounds."""

    memory: list[int]
    files: list[int]
    threads: list[int]


def rounds(world: World, run: Run, run_dir: Path, num_rounds: int, leak: int) -> Counted:
    """Evaluate and save, again and again; counted ten times. `leak`: bytes, and a file, that every round keeps."""
    job = assembled(world, run, run_dir)
    assert job.eval_plan is not None
    names, kept, seen = [source.name for source in job.data.eval], [], Counted([], [], [])
    with WriteBehind(run, run_dir, job.strategy, world) as checkpoints:
        for number in range(1, num_rounds + 1):
            evaluate(job.strategy, job.eval_plan.eval_steps(), world, names)
            checkpoints.save(TrainState(number))
            if leak:
                kept.append((bytearray(os.urandom(leak)), open("/dev/null")))  # noqa: SIM115
            if number % (num_rounds // 10) == 0:
                checkpoints.wait()
                gc.collect()
                seen.memory.append(anonymous())
                seen.files.append(len(os.listdir("/proc/self/fd")))
                seen.threads.append(threading.active_count())
    assert layout.steps(run_dir) == [num_rounds - 1, num_rounds]
    return seen


def assert_flat(seen: Counted) -> None:
    """Nothing that a round uses stays: what stays shows in every count, while what the allocator takes for good comes
    once in a while (4 MiB at a time), and ever more seldom."""
    growth = [later - earlier for earlier, later in pairwise(seen.memory)]
    assert median(growth) < 0.4 * MIB, seen
    assert max(seen.memory[5:]) < max(seen.memory[:5]) + 10 * MIB, seen
    assert len(set(seen.files[2:])) == 1, seen
    assert len(set(seen.threads[2:])) == 1, seen


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("many"))


@pytest.mark.trial(ROW)
@pytest.mark.parametrize(
    ("strategy", "num_rounds"),
    [("fsdp", 60), *(pytest.param(name, 1000, marks=pytest.mark.thorough) for name in ("fsdp", "zero2", "zero3"))],
)
def test_memory_and_open_files_are_flat(
    pool: Callable[[int], Pool], shop: Shop, strategy: str, num_rounds: int
) -> None:
    name = f"flat-{strategy}-{num_rounds}"
    run = run_of(shop.words(name, f"strategy={strategy}", "data.eval_fraction=0.2", "data.sequence_length=1024"))
    for seen in pool(2).run(rounds, run, shop.folder / name, num_rounds, 0):
        assert_flat(seen)


def test_a_leak_would_be_seen(pool: Callable[[int], Pool], shop: Shop) -> None:
    """Negative control."""
    run = run_of(shop.words("leak", "strategy=ddp", "data.eval_fraction=0.2"))
    [seen] = pool(1).run(rounds, run, shop.folder / "leak", 20, MIB // 2)  # 1 MiB from one count to the next
    with pytest.raises(AssertionError):
        assert_flat(Counted(seen.memory, [0] * 10, [0] * 10))
    with pytest.raises(AssertionError):
        assert_flat(Counted([0] * 10, seen.files, [0] * 10))


# --- one of them ------------------------------------------------------------------------------------------------------

LARGE = ["model.tiny.hidden_size=256", "model.tiny.num_layers=4", "model.tiny.intermediate_size=3072", "strategy=fsdp"]


def one_save(world: World, run: Run, run_dir: Path) -> tuple[int, int, int, int]:
    """Bytes of this rank's file and of its largest range; what a save behind training took, and one at once."""
    job = assembled(world, run, run_dir)
    shards = owned(job.strategy)
    largest = max(4 * shard.tensor.numel() for shard in shards)
    taken = []
    for background in (True, False):
        run.checkpoint.background = background
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would be taken again unseen
        peak = Peak()
        with WriteBehind(run, run_dir, job.strategy, world) as checkpoints, peak.watched():
            for step in (1, 2):  # the first is also compared with what was trained
                checkpoints.save(TrainState(step))
                checkpoints.wait()
        taken.append(peak.most)
    return ranges.num_bytes_of(shards), largest, taken[0], taken[1]


def test_a_save_takes_the_host_memory_of_this_ranks_shard(pool: Callable[[int], Pool], shop: Shop) -> None:
    run = run_of(shop.words("large", *LARGE))
    for num_bytes, largest, behind, at_once in pool(2).run(one_save, run, shop.folder / "large"):
        assert num_bytes > 40 * MIB, "else what else goes on would show"
        assert num_bytes * 0.9 < behind < num_bytes + largest + 16 * MIB
        assert at_once < largest + 16 * MIB


# --- read back --------------------------------------------------------------------------------------------------------


def read_from_disk() -> int:
    """Bytes that this process made the kernel fetch from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def test_reading_back_reads_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
    record = layout.FileRecord(8 * MIB, ranges.hash_file(path))
    start = read_from_disk()
    assert ranges.hash_file(path) == record.xxh3_128
    cached = read_from_disk() - start
    assert ranges.read_back(path, record) == ""
    fetched = read_from_disk() - start - cached
    if not fetched and on_tmpfs(tmp_path):
        cannot("faults", "the folder of temporary files lies in memory")
    assert cached < MIB, "control: a plain reading is answered from memory"
    assert fetched >= 8 * MIB
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert "other bytes" in ranges.read_back(path, record)
    os.truncate(path, 5)
    assert "5 bytes" in ranges.read_back(path, record)


class FlipsABit:
    """A disk that loses a bit of a file between writing and reading it back."""

    def __init__(self, name: str) -> None:
        self.name, self.active = name, True
        sys.addaudithook(self.audit)  # for the life of the process; once used it does nothing

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.active and args[1] is None and str(args[0]).endswith(self.name):  # os.open
            self.active = False
            flip_a_bit(Path(args[0]))


def lost_while_written(world: World, folder: Path, case: Case) -> tuple[str, list[int], bool]:
    """Two checkpoints, and a third whose file of rank 1 the disk changes: what is told, and what is there."""
    run = case_run(case)
    run.checkpoint.keep = 1
    strategy = prepared(world, case)
    checkpoints = WriteBehind(run, folder, strategy, world)
    for step in (1, 2):
        train(strategy, world, case, step)
        checkpoints.save(TrainState(step))
        checkpoints.wait()
    if world.rank == 1:
        FlipsABit(layout.rank_file(1))
    told = ""
    try:
        checkpoints.save(TrainState(3))
        checkpoints.wait()
    except NegativeVerdict as verdict:
        told = str(verdict)
    return told, layout.steps(folder), any((folder / "checkpoints").glob("*.tmp-*"))


def test_what_is_not_verified_replaces_nothing(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    case = Case("fsdp", 1, Recipe(optimizer="adamw", lr=0.01))
    for told, there, left_over in pool(2).run(lost_while_written, tmp_path, case):
        assert "rank-00001.safetensors holds other bytes than were written" in told
        assert "loses data" in told
        assert there == [2], "with checkpoint.keep=1 the one before stays, because the new one was not verified"
        assert not left_over
    assert pool(2).run(taken_up, case, tmp_path)[0][0] == 2


def on_tmpfs(path: Path) -> bool:
    kinds = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [words for words in kinds if path.is_relative_to(words[1])]
    return max(holding, key=lambda words: len(words[1]))[2] == "tmpfs"
