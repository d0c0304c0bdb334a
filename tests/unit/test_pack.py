"""Bins hold every row once, are filled, and are a pure function of their arguments."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from distft.data.pack import epoch_bins, fill_bins

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """The textbook's number of bins."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


def check(lengths: np.ndarray, capacity: int) -> int:
    bins = fill_bins(lengths, capacity)
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[rows].sum() <= capacity for rows in bins)
    return len(bins)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["uniform", "lognormal", "short", "two", "full"])
def test_every_row_once_and_no_more_bins_than_best_fit_decreasing(shape: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = [64, 100, 512, 1000][seed]
    lengths = {
        "uniform": random.integers(1, capacity + 1, 700),
        "lognormal": np.clip(random.lognormal(np.log(capacity / 5), 0.6, 900).astype(int), 1, capacity),
        "short": random.integers(1, max(2, capacity // 30), 2000),
        "two": random.choice([capacity // 3 + 1, capacity // 2], 300),
        "full": np.full(20, capacity),
    }[shape]
    found, textbook, least = check(lengths, capacity), best_fit_decreasing(lengths, capacity), lengths.sum() / capacity
    assert least <= found <= textbook + max(1, 0.01 * textbook)


def test_small_and_impossible() -> None:
    assert len(fill_bins(np.zeros(0, dtype=np.int32), 8)) == 0
    assert check(np.array([8]), 8) == 1
    assert check(np.array([5, 5, 3, 3]), 8) == 2
    for wrong in ([9], [0], [-1]):
        with pytest.raises(ValueError, match="between 1 and the capacity"):
            fill_bins(np.array(wrong), 8)


def test_an_epoch_is_pure_and_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 3000)
    one, again = epoch_bins(lengths, 512, 7, 2, 1), epoch_bins(lengths, 512, 7, 2, 1)
    assert np.array_equal(one.items, again.items)
    assert np.array_equal(one.starts, again.starts)
    for other in (
        epoch_bins(lengths, 512, 8, 2, 1),
        epoch_bins(lengths, 512, 7, 3, 1),
        epoch_bins(lengths, 512, 7, 2, 0),
    ):
        assert len(other) == len(one)
        assert sorted(other.items.tolist()) == list(range(3000))
        assert not np.array_equal(other.items, one.items)
    assert all(lengths[rows].sum() <= 512 for rows in one)
    means = [np.mean([lengths[rows].mean() for rows in part]) for part in (list(one)[:150], list(one)[-150:])]
    assert abs(means[0] - means[1]) < 0.2 * np.mean(means)  # bins come in no order of length


def test_a_million_rows_are_quick() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.6, 1_000_000).astype(int), 2, 1024)
    started = time.process_time()
    bins = epoch_bins(lengths, 1024, 0, 0, 0)
    assert time.process_time() - started < 10  # one second on an idle core
    assert bins.fill(lengths, 1024) > 0.999


@pytest.mark.skipif(not GSM8K.exists(), reason=f"{GSM8K} is not here")
def test_gsm8k_fills_99_5_percent_at_1024(tmp_path: Path) -> None:
    from functools import partial

    from distft.data.sources import texts
    from distft.model.folder import load_tokenizer, resolve
    from tests.unit.some_data import a_run, prepared

    run = a_run(tmp_path, path=str(GSM8K), sequence_length=1024, eval_fraction=0)
    run.model.tiny.hidden_size, run.model.tiny.num_layers = 16, 1
    tokenizer = load_tokenizer(resolve(run, partial(texts, run)), run)
    source = prepared(run, tokenizer, tmp_path).train[0]
    assert len(source.lengths) == 7473
    assert fill_bins(source.lengths, 1024).fill(source.lengths, 1024) >= 0.995
