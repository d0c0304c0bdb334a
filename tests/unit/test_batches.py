"""Every step is the same global batch for any number of ranks and in both layouts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distft.config.schema import Batch as BatchConfig
from distft.config.schema import Source
from distft.data.batch import Batch, Step
from distft.data.batches import Plan, Prefetch
from distft.data.cache import EncodedSource, PreparedData
from distft.data.order import TURN, Order
from tests.unit.some_data import a_run, byte_level, prepared, questions, write_jsonl

LENGTH = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Two sources of 150 and 40 rows."""
    folder = tmp_path_factory.mktemp("data")
    sources = [
        Source(path=write_jsonl(folder / "large.jsonl", questions(150))),
        Source(path=write_jsonl(folder / "small.jsonl", questions(190)[150:])),
    ]
    return prepared(a_run(folder, sources=sources, sequence_length=LENGTH), byte_level(), folder)


def plan_of(data: PreparedData, rank: int = 0, size: int = 1, **changes: Any) -> Plan:
    batch = BatchConfig(changes.pop("global_size", 6), changes.pop("micro_size", 1), changes.pop("pass_tokens", None))
    sources = changes.pop("sources", data.train)
    return Plan(sources, batch, LENGTH, changes.pop("seed", 3), changes.pop("packed", True), rank, size)


def with_weights(data: PreparedData, *weights: float) -> list[EncodedSource]:
    return [EncodedSource(s.name, weight, s.tokens, s.rows) for s, weight in zip(data.train, weights, strict=True)]


def documents_of(step: Step) -> list[tuple[int, int]]:
    return [document for batch in step.micro_batches for document in batch.documents]


def said(batch: Batch) -> list[tuple[int, int, int]]:
    """(previous token, target, source) of every target, in order."""
    before = batch.input_ids.reshape(-1)[batch.positions].tolist()
    return list(zip(before, batch.targets.tolist(), batch.sources.tolist(), strict=True))


def equal(one: Step, other: Step) -> bool:
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    return one.index == other.index and all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets) for a, b in pairs
    )


def test_targets_are_the_trained_tokens_but_the_first(data: PreparedData) -> None:
    for packed in (True, False):
        for batch in plan_of(data, packed=packed).step(2).micro_batches:
            expected = []
            for source, row in batch.documents:
                ids, trained = data.train[source].row(row)
                expected += [(int(ids[i - 1]), int(ids[i]), source) for i in range(1, len(ids)) if trained[i]]
            assert said(batch) == expected
            assert batch.num_supervised == len(expected) > 0


def test_both_layouts_hold_the_same_documents(data: PreparedData) -> None:
    one, other = plan_of(data, micro_size=2).step(1), plan_of(data, micro_size=2, packed=False).step(1)
    for flat, rows in zip(one.micro_batches, other.micro_batches, strict=True):
        assert flat.documents == rows.documents
        assert flat.lengths == rows.lengths
        assert flat.max_length == rows.max_length == max(flat.lengths)
        assert said(flat) == said(rows)
        assert flat.num_tokens == rows.num_tokens == sum(flat.lengths) == flat.input_ids.numel()
        assert flat.attention_mask is None
        assert rows.cu_seqlens is None
        assert rows.attention_mask is not None
        assert rows.attention_mask.sum(1).tolist() == list(rows.lengths)
        assert flat.cu_seqlens is not None
        assert flat.cu_seqlens.tolist() == np.cumsum([0, *flat.lengths]).tolist()
        positions = [position for length in flat.lengths for position in range(length)]
        assert flat.position_ids[0].tolist() == positions
        assert rows.position_ids[rows.attention_mask].tolist() == positions
        assert rows.input_ids[rows.attention_mask].tolist() == flat.input_ids[0].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_size", [1, 2])
def test_any_number_of_ranks_shares_the_same_global_batch(data: PreparedData, size: int, micro_size: int) -> None:
    alone = plan_of(data).step(3)
    steps = [plan_of(data, rank, size, micro_size=micro_size).step(3) for rank in range(size)]
    shared = [document for step in steps for document in documents_of(step)]
    assert sorted(shared) == sorted(documents_of(alone))
    assert len({len(step.micro_batches) for step in steps}) == 1
    for step in steps:
        counts = (alone.num_supervised, alone.num_tokens, alone.source_supervised, alone.source_tokens, alone.first_bin)
        assert counts == (
            step.num_supervised,
            step.num_tokens,
            step.source_supervised,
            step.source_tokens,
            step.first_bin,
        )
    batches = [batch for step in steps for batch in step.micro_batches]
    assert sum(batch.num_supervised for batch in batches) == alone.num_supervised
    assert sum(batch.num_tokens for batch in batches) == alone.num_tokens
    by_source = torch.bincount(torch.cat([batch.sources for batch in batches]), minlength=2)
    assert tuple(by_source.tolist()) == alone.source_supervised
    if size == 8:  # six bins: two ranks run an empty micro-batch
        assert sum(batch.num_tokens == 0 and batch.num_supervised == 0 for batch in batches) == 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pass_tokens", [1, 60, 100_000])
def test_passes_cut_micro_batches_between_documents(data: PreparedData, packed: bool, pass_tokens: int) -> None:
    changes: dict[str, Any] = {"micro_size": 2, "packed": packed}
    for rank in range(2):
        whole = plan_of(data, rank, 2, **changes).step(4)
        cut, others = (plan_of(data, r, 2, pass_tokens=pass_tokens, **changes).step(4) for r in (rank, 1 - rank))
        assert sorted(documents_of(cut)) == sorted(documents_of(whole))
        assert len(cut.micro_batches) == len(others.micro_batches)
        assert (cut.num_supervised, cut.num_tokens) == (whole.num_supervised, whole.num_tokens)
        for batch in cut.micro_batches:
            assert batch.input_ids.numel() <= pass_tokens or len(batch.documents) < 2
        places = [cut.place(index) for index in range(len(cut.micro_batches))]
        assert len(set(places)) == len(places), "passes with the same place would draw the same random numbers"
        for number, batch in enumerate(whole.micro_batches):
            parts = [part for part, place in zip(cut.micro_batches, places, strict=True) if place[0] == number]
            taken = [document for part in parts for document in part.documents]
            lengths = [length for part in parts for length in part.lengths if part.documents]
            if packed or len(parts) == 1:
                assert taken == list(batch.documents)
            else:
                assert sorted(taken) == sorted(batch.documents)
                assert lengths == sorted(lengths, reverse=True), "rows of like length go together"
        if pass_tokens == 100_000:
            assert equal(cut, whole)
        else:
            assert len(cut.micro_batches) > len(whole.micro_batches)


def test_steps_can_be_asked_for_in_any_order(data: PreparedData) -> None:
    forward, backward = plan_of(data), plan_of(data)
    one = [forward.step(index) for index in range(12)]
    other = [backward.step(index) for index in reversed(range(12))][::-1]
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))
    assert not equal(one[0], plan_of(data, seed=4).step(0))


def test_an_epoch_has_every_row_once_and_its_tail_goes_on(data: PreparedData) -> None:
    plan = plan_of(data, global_size=1)
    bins = sum(plan.num_bins)
    every = sorted((source, row) for source in range(2) for row in range(len(data.train[source].lengths)))
    for epoch in range(3):
        seen = [place for index in range(epoch * bins, (epoch + 1) * bins) for place in documents_of(plan.step(index))]
        assert sorted(seen) == every
    assert plan_of(data).num_steps(2.0, None) == -(-2 * bins // 6)
    assert plan_of(data).num_steps(1.0, 5) == 5
    assert plan_of(data, global_size=10_000).num_steps(1.0, None) == 1
    crossing = plan_of(data, global_size=bins + 3).step(0)
    assert len(crossing.micro_batches) == bins + 3


def test_weights_oversample(data: PreparedData) -> None:
    plan = plan_of(data, sources=with_weights(data, 1, 3), global_size=4)
    for index in range(20):
        sources = [batch.documents[0][0] for batch in plan.step(index).micro_batches]
        assert sorted(sources) == [0, 1, 1, 1]
    seen = [row for index in range(20) for source, row in documents_of(plan.step(index)) if source == 1]
    assert len(seen) > len(set(seen)) == len(data.train[1].lengths)


@pytest.mark.parametrize("shares", [[1.0, 1.0], [408.0, 22.0], [0.7, 0.2, 0.1], [1e-3, 5.0, 2.5], [3.0]])
def test_the_order_of_sources_is_fair_at_every_moment(shares: list[float]) -> None:
    order = Order(shares)
    count = 3000
    places = order.places(0, count)
    taken = [0] * len(shares)
    for index, (source, number) in enumerate(places):
        assert number == taken[source]
        taken[source] += 1
        for other, share in enumerate(shares):
            assert abs(taken[other] - (index + 1) * share / sum(shares)) <= 1
        if index % 371 == 0:
            assert order.taken(index + 1) == taken
    for first in (0, 1, 17, 2990):
        assert order.places(first, 10) == order.places(0, first + 10)[first:]


def test_the_order_goes_on_over_its_turns() -> None:
    order = Order([5.0, 2.0, 1.0])
    around = order.places(TURN - 40, 80)
    assert Order([5.0, 2.0, 1.0]).places(TURN, 5) == around[40:45]
    assert [after - before for before, after in zip(order.taken(TURN - 40), order.taken(TURN + 40), strict=True)] == [
        sum(source == other for other, _ in around) for source in range(3)
    ]


def test_the_cursor_is_json_and_names_epoch_and_bin(data: PreparedData) -> None:
    plan = plan_of(data)
    assert all(source["epoch"] == source["bin"] == 0 for source in plan.cursor(0)["sources"])
    cursor = plan.cursor(40)
    assert json.loads(json.dumps(cursor)) == cursor
    taken = [s["epoch"] * bins + s["bin"] for s, bins in zip(cursor["sources"], plan.num_bins, strict=True)]
    assert sum(taken) == 40 * 6
    seen = [batch.documents[0][0] for index in range(40) for batch in plan.step(index).micro_batches]
    assert taken == [seen.count(0), seen.count(1)]


def test_evaluation_sees_every_row_once_on_all_ranks_together(data: PreparedData) -> None:
    plans = [plan_of(data, rank, 3, sources=data.eval, global_size=2) for rank in range(3)]
    steps = [list(plan.eval_steps()) for plan in plans]
    assert len({tuple(len(step.micro_batches) for step in own) for own in steps}) == 1
    seen = sorted(place for own in steps for step in own for place in documents_of(step))
    assert seen == [(source, row) for source, part in enumerate(data.eval) for row in range(len(part.lengths))]
    assert sum(step.num_tokens for step in steps[0]) == sum(int(part.lengths.sum()) for part in data.eval)


def test_prefetched_steps_are_the_steps(data: PreparedData) -> None:
    plan = plan_of(data)
    steps = list(Prefetch(plan, 4, 9))
    assert [step.index for step in steps] == [4, 5, 6, 7, 8]
    assert all(equal(step, plan.step(step.index)) for step in steps)
    assert list(Prefetch(plan, 4, 4)) == []


def test_an_error_while_prefetching_reaches_the_loop_and_no_thread_stays(data: PreparedData) -> None:
    class Failing(Plan):
        def step(self, index: int) -> Step:
            if index == 2:
                raise RuntimeError("the third step cannot be made")
            return super().step(index)

    plan = Failing(data.train, BatchConfig(2, 1), LENGTH, 0, True, 0, 1)
    seen = []
    with pytest.raises(RuntimeError, match="third step"):
        seen += [step.index for step in Prefetch(plan, 0, 5)]
    for step in Prefetch(plan_of(data), 0, 1000):
        if step.index == 1:
            break
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Watched(Plan):
    """Tells which steps have been made, and fails at `fails`."""

    def __init__(self, data: PreparedData, fails: int = -1) -> None:
        super().__init__(data.train, BatchConfig(2, 1), LENGTH, 0, True, 0, 1)
        self.fails, self.finished = fails, [threading.Event() for _ in range(8)]

    def step(self, index: int) -> Step:
        if index == self.fails:
            raise OSError(f"step {index} cannot be read")
        step = super().step(index)
        self.finished[index].set()
        return step


def made_meanwhile(plan: Watched, steps: Iterator[Step], seconds: float) -> bool:
    """While the first step is being computed, which nobody asks the plan during: are the next two made?"""
    assert next(steps).index == 0
    return all(plan.finished[index].wait(seconds) for index in (1, 2))


def test_the_next_global_batches_are_ready_before_they_are_asked_for(data: PreparedData) -> None:
    plan = Watched(data)
    steps = iter(Prefetch(plan, 0, 8))
    assert made_meanwhile(plan, steps, seconds=20)
    assert not plan.finished[6].is_set()  # and no more than a few: memory stays bounded
    assert [step.index for step in steps] == list(range(1, 8))
    plan = Watched(data)
    assert not made_meanwhile(plan, map(plan.step, range(8)), seconds=0.2)  # without the thread they are not


def test_an_error_made_ahead_comes_when_its_step_is_due(data: PreparedData) -> None:
    plan = Watched(data, fails=3)
    steps = iter(Prefetch(plan, 0, 8))
    assert made_meanwhile(plan, steps, seconds=20)
    assert [next(steps).index, next(steps).index] == [1, 2]
    with pytest.raises(OSError, match="step 3 cannot be read"):
        next(steps)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_rows_come_with_their_ids(data: PreparedData) -> None:
    source = data.train[1]
    ids = [int(source.row_id(index)) for index in range(len(source.lengths))]
    assert ids == sorted(ids)
    assert 1 <= ids[0] < ids[-1] <= 40
