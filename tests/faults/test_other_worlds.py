"""Going on with other ranks, another engine, another micro-batch: the same samples in order, and the same losses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.faults.jobs import Documents, run_of, trained
from tests.faults.runs import Shop, final_weights, records
from tests.pool import Pool

TRIAL = "resume 2->1, 2->4, 4->2 ranks, and across strategies"
GLOBAL, LAST, HALF = 4, 14, 6
KNOBS = [f"batch.global_size={GLOBAL}", f"max_steps={LAST}", "checkpoint.every=2", "checkpoint.keep=9",
         "data.sequence_length=64", "data.eval_fraction=0"]  # fmt: skip
ENGINES = ("fsdp", "zero2", "zero3")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("worlds"), num_rows=24)


def train(pool: Pool, shop: Shop, name: str, *knobs: str) -> list[dict[int, Documents]]:
    run = run_of(shop.words(name, *KNOBS, *knobs))
    return pool.run(trained, run, shop.folder / name)


Whole = Callable[[str, int, str], tuple[list[dict[int, Documents]], Path]]


@pytest.fixture(scope="module")
def whole(pool: Callable[[int], Pool], shop: Shop) -> Whole:
    """`whole(strategy, num_ranks, tuning)`: sample ids by rank of an uninterrupted run, and its folder; made once."""
    known: dict[str, tuple[list[dict[int, Documents]], Path]] = {}

    def once(strategy: str, num_ranks: int, tuning: str) -> tuple[list[dict[int, Documents]], Path]:
        name = f"whole-{strategy}-{num_ranks}-{tuning}"
        if name not in known:
            seen = train(pool(num_ranks), shop, name, f"strategy={strategy}", f"tuning={tuning}")
            known[name] = seen, shop.folder / name
        return known[name]

    return once


def by_step(ranks: list[dict[int, Documents]]) -> dict[int, list[tuple[int, int]]]:
    """What all ranks together were given in each step."""
    return {step: sorted(document for rank in ranks for batch in rank[step] for document in batch) for step in ranks[0]}


def in_order(ranks: list[dict[int, Documents]]) -> list[tuple[int, int]]:
    """The documents of a run with one bin a micro-batch, as the plan lines them up: bins go round the ranks."""
    bins = [ranks[index % len(ranks)][step][index // len(ranks)] for step in ranks[0] for index in range(GLOBAL)]
    return [document for one in bins for document in one]


def assert_every_row_once_an_epoch(sequence: list[tuple[int, int]], num_rows: int) -> None:
    assert len(sequence) > 2 * num_rows, "else this shows nothing"
    for start in range(0, len(sequence), num_rows):
        epoch = sequence[start : start + num_rows]
        assert len(set(epoch)) == len(epoch), f"twice in one epoch: {epoch}"


def goes_on(
    pool: Callable[[int], Pool], shop: Shop, whole: Whole, written: tuple[str, int], read: tuple[str, int], micro: int,
    tuning: str,
) -> None:  # fmt: skip
    before, folder = whole(*written, tuning)
    assert_every_row_once_an_epoch(in_order(before), num_rows=24)
    source = folder / "checkpoints" / f"step-{HALF:06d}"
    name = f"{written[0]}-{written[1]}-to-{read[0]}-{read[1]}-{micro}-{tuning}"
    after = train(pool(read[1]), shop, name, f"strategy={read[0]}", f"tuning={tuning}", f"batch.micro_size={micro}",
                  f"resume={source}")  # fmt: skip
    expected = {step: documents for step, documents in by_step(before).items() if step >= HALF}
    assert list(expected) == list(range(HALF, LAST))
    assert by_step(after) == expected
    assert expected[HALF] != expected[HALF + 1], "else equal steps would show nothing"
    losses = {record["step"]: record["loss"] for record in records(folder)}
    again = {record["step"]: record["loss"] for record in records(shop.folder / name)}
    assert list(again) == list(range(HALF + 1, LAST + 1))
    assert again == pytest.approx({step: losses[step] for step in again}, rel=1e-5)
    assert final_weights(shop.folder / name).keys() == final_weights(folder).keys()


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize(
    ("written", "read", "micro"),
    [
        (("zero2", 2), ("fsdp", 1), 1),
        (("zero2", 2), ("zero3", 4), 1),
        (("fsdp", 4), ("zero2", 2), 2),
    ],
)
def test_the_same_samples_and_losses(
    pool: Callable[[int], Pool], shop: Shop, whole: Whole, written: tuple[str, int], read: tuple[str, int], micro: int
) -> None:
    goes_on(pool, shop, whole, written, read, micro, "full")


@pytest.mark.thorough
@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("written", "read"), list(product(ENGINES, repeat=2)))
@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(2, 1), (2, 4), (4, 2)])
def test_the_same_samples_and_losses_from_every_engine_to_every_other(
    pool: Callable[[int], Pool], shop: Shop, whole: Whole, ranks_before: int, ranks_after: int, written: str, read: str,
    tuning: str,
) -> None:  # fmt: skip
    goes_on(pool, shop, whole, (written, ranks_before), (read, ranks_after), 1 + (ranks_after < 4), tuning)


def test_a_sample_given_twice_or_never_would_be_seen() -> None:
    """Negative control."""
    sequence = [(0, row) for row in range(5)] * 3
    assert_every_row_once_an_epoch(sequence, 5)
    for wrong in (sequence[:7] + sequence[8:], [*sequence[:7], sequence[6], *sequence[7:]]):
        with pytest.raises(AssertionError, match="twice"):
            assert_every_row_once_an_epoch(wrong, 5)
