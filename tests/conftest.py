"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.pool import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
