"""How much host memory a start takes: each rank its own part of the model and no more than a tensor besides."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.config.load import compose
from distft.config.schema import Run
from distft.world import World
from tests.pool import Pool
from tests.small_run import SMALL, write_rows

LARGER = [  # a hundred megabytes in fp32, so that what Python itself allocates is small beside it
    "model.tiny.hidden_size=640",
    "model.tiny.num_layers=5",
    "model.tiny.num_heads=8",
    "model.tiny.num_kv_heads=4",
    "model.tiny.intermediate_size=1920",
]


@pytest.fixture(scope="module")
def prepared_runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[str], Path]]:
    """A small run and a larger one: words and folder of each, with everything in it that preflight leaves there."""
    from distft.verbs.preflight import preflight

    folder = tmp_path_factory.mktemp("start")
    rows, runs = write_rows(folder / "rows.jsonl"), []
    for name, shape in (("small", []), ("larger", LARGER)):
        (folder / name).mkdir()
        data = ["data=jsonl", f"data.path={rows}", f"data.cache_dir={folder / 'cache'}"]
        words = [*SMALL, *shape, *data, "precision=fp32"]
        preflight(compose(words, "train").run, folder / name)
        runs.append((words, folder / name))
    return runs


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


class Peak:
    """The most anonymous memory that was in use inside, above what was in use before; looked at all the time."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier tests freed would hide what is taken now
        self.before = self.most = anonymous()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join()
        self.most = max(self.most, anonymous())

    @property
    def taken(self) -> int:
        return self.most - self.before


def start(world: World, runs: list[tuple[list[str], Path]], strategy: str) -> tuple[int, int, int]:
    """Assemble the small run, so that everything is imported, then the larger one.

    Returns the peak of the larger one above what was in use before it, its model's size and its largest tensor's, in
    bytes.
    """
    from distft.model.mapping import shapes_of
    from distft.verbs.train import Job
    from distft.weights.store import num_elements

    (small, larger), strategy_word = runs, f"strategy={strategy}"
    Job.assemble(compose([*small[0], strategy_word], "train").run, small[1], world)
    run: Run = compose([*larger[0], strategy_word], "train").run
    with Peak() as peak:
        job = Job.assemble(run, larger[1], world)
    sizes = [4 * num_elements(shape) for shape in shapes_of(job.strategy.trainee.model).values()]
    return peak.taken, sum(sizes), max(sizes)


def bar(size: int, largest: int, num_ranks: int) -> float:
    return 1.3 * size / num_ranks + largest


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_start_takes_each_ranks_own_part(
    pool: Callable[[int], Pool], prepared_runs: list[tuple[list[str], Path]], strategy: str
) -> None:
    for taken, size, largest in pool(2).run(start, prepared_runs, strategy):
        print(strategy, taken / 1e6, size / 1e6, largest / 1e6, bar(size, largest, 2) / 1e6)
        assert taken <= bar(size, largest, 2)


def test_a_start_that_holds_everything_is_over_the_bar(
    pool: Callable[[int], Pool], prepared_runs: list[tuple[list[str], Path]]
) -> None:
    for taken, size, largest in pool(2).run(start, prepared_runs, "ddp"):
        assert taken > bar(size, largest, 2)
