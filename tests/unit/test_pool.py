from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from distft.errors import UserMistake
from distft.world import World
from tests.pool import Pool, RankFailed


def add_ranks(world: World, factor: int) -> tuple[int, int]:
    total = torch.tensor(world.rank)
    dist.all_reduce(total)
    return os.getpid(), int(total) * factor


def mistake_everywhere(world: World) -> None:
    raise UserMistake("Set the knob.")


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("only here")
    dist.barrier()


def die(world: World) -> None:
    os._exit(9)


def test_the_same_processes_run_every_job(pool: Callable[[int], Pool]) -> None:
    first = pool(2).run(add_ranks, 10)
    second = pool(2).run(add_ranks, 7)
    assert [value for _, value in first] == [10, 10]
    assert [value for _, value in second] == [7, 7]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


def test_a_rank_s_exception_is_raised_with_its_traceback(pool: Callable[[int], Pool]) -> None:
    with pytest.raises(UserMistake, match=r"Set the knob\.") as caught:
        pool(2).run(mistake_everywhere)
    assert "mistake_everywhere" in "".join(caught.value.__notes__)
    assert [value for _, value in pool(2).run(add_ranks, 1)] == [1, 1]


def test_the_pool_starts_anew_after_a_rank_failed_alone_or_died() -> None:
    fresh = Pool(2)
    try:
        before = [pid for pid, _ in fresh.run(add_ranks, 1)]
        with pytest.raises(ValueError, match="only here"):
            fresh.run(fail_on_one)
        after = fresh.run(add_ranks, 3)
        assert [value for _, value in after] == [3, 3]
        assert not set(before) & {pid for pid, _ in after}
        with pytest.raises(RankFailed, match="died"):
            fresh.run(die)
        assert not fresh.processes
    finally:
        fresh.stop()
