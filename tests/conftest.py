"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.pool import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


SLOWEST_FIRST = ("parity", "entry", "cluster", "faults", "golden", "contract", "unit")
NEED_RANKS = (
    "tests/parity/",
    "tests/unit/test_decode.py",
    "tests/unit/test_pool.py",
    "tests/faults/test_other_worlds.py",
    "tests/faults/test_saves.py",
    "tests/faults/test_full_disk.py",
    "tests/faults/test_many_saves.py",
    "tests/faults/test_guards.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="run the long forms of the fault trials too")
    parser.addoption("--table", help="write the results of the fault trials into this page")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest folders first, so that several workers end together."""
    folders = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: SLOWEST_FIRST.index(folders[item]) if folders[item] in SLOWEST_FIRST else 9)


class OnePoolForAll(LoadScopeScheduling):
    """On several workers the tests of a file stay on one of them, and so do all tests that need a pool of ranks.

    pytest-xdist's own groups (3.8) do nothing under pytest 9.2, whose node ids cannot be written to.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "ranks" if nodeid.startswith(NEED_RANKS) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OnePoolForAll:
    return OnePoolForAll(config, log)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(num_ranks)`: the one pool of that size, started when first asked for and kept for the whole session."""
    pools: dict[int, Pool] = {}

    def pool_of(num_ranks: int) -> Pool:
        if num_ranks not in pools:
            pools[num_ranks] = Pool(num_ranks)
        return pools[num_ranks]

    yield pool_of
    for one in pools.values():
        one.stop()
