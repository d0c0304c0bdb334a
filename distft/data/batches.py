"""Bins to batches: which bins every step takes, and what each rank makes of its share."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distft import heartbeat
from distft.config.schema import Batch as BatchConfig
from distft.data.batch import Batch, Step
from distft.data.order import Order, Place
from distft.data.pack import Bins, epoch_bins

if TYPE_CHECKING:
    from distft.data.cache import EncodedSource


class Plan:
    """What every step of a run is made of. Any step can be asked for at any time; only `skipped` ever changes.

    Args:
        sources: tokenised sources; their order is part of the plan.
        batch: `global_size` bins a step over all ranks, `micro_size` bins a micro-batch, `pass_tokens` a forward pass.
        sequence_length: positions of a bin.
        packed: lay the documents of a micro-batch into one row, or one document a row. The documents are the same.
        data_rank, data_size: this rank's share of a step is bins data_rank::data_size.

    `skipped` holds steps, counted from 0, that the run passes over: they keep their number, and every other step its
    own bins, learning rate and random numbers.
    """

    def __init__(
        self,
        sources: Sequence[EncodedSource],
        batch: BatchConfig,
        sequence_length: int,
        seed: int,
        packed: bool,
        data_rank: int,
        data_size: int,
    ) -> None:
        self.sources, self.batch, self.sequence_length = list(sources), batch, sequence_length
        self.seed, self.packed, self.data_rank, self.data_size = seed, packed, data_rank, data_size
        self.made: OrderedDict[tuple[int, int], Bins] = OrderedDict()  # the last epochs' bins
        self.num_bins = [len(self.bins(source, 0)) for source in range(len(self.sources))]
        weights = [source.weight for source in self.sources]
        self.shares = [float(weight or count) for weight, count in zip(weights, self.num_bins, strict=True)]
        self.order = Order(self.shares)
        self.skipped: set[int] = set()

    def bins(self, source: int, epoch: int) -> Bins:
        """The bins of a source in one epoch, made when they are first asked for."""
        key = (source, epoch)
        if key not in self.made:
            lengths = self.sources[source].lengths
            self.made[key] = epoch_bins(lengths, self.sequence_length, self.seed, epoch, source)
            while len(self.made) > 2 * len(self.sources) + 1:
                self.made.popitem(last=False)
        self.made.move_to_end(key)
        return self.made[key]

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        """Steps of a run: `max_steps`, or as many as take `epochs` times the bins of all sources, at least one.

        Sources with weights share that number of bins by weight: some rows come more than once an epoch, some less.
        """
        if max_steps is not None:
            return max_steps
        return max(1, math.ceil(epochs * sum(self.num_bins) / self.batch.global_size - 1e-9))

    def step(self, index: int) -> Step:
        """The global batch number `index` as this rank sees it."""
        first = index * self.batch.global_size
        if index in self.skipped:
            none = (0,) * len(self.sources)
            return Step(index, (), 0, 0, source_supervised=none, source_tokens=none, first_bin=first)
        places = self.order.places(first, self.batch.global_size)
        return self._step(index, first, [self._documents(*place) for place in places])

    def sample_ids(self, index: int) -> list[str]:
        """`source:row` of every document of the global batch number `index`, over all ranks."""
        places = self.order.places(index * self.batch.global_size, self.batch.global_size)
        return self.names([document for place in places for document in self._documents(*place)])

    def names(self, documents: Iterable[Place]) -> list[str]:
        """`source:row` of documents, with the rows' own ids."""
        return [f"{self.sources[source].name}:{self.sources[source].row_id(row)}" for source, row in documents]

    def eval_steps(self) -> Iterator[Step]:
        """Every bin of all sources once; the last step may be short."""
        places = [(source, number) for source, count in enumerate(self.num_bins) for number in range(count)]
        for index, first in enumerate(range(0, len(places), self.batch.global_size)):
            chosen = places[first : first + self.batch.global_size]
            yield self._step(index, first, [self._documents(*place) for place in chosen])

    def cursor(self, step: int) -> dict[str, Any]:
        """Where each source stands after `step` steps, in JSON's types: what resuming compares and people read.

        `skipped`: the steps that the run passes over, counted from 1 as those of metrics.jsonl.
        """
        taken = self.order.taken(step * self.batch.global_size)
        return {
            "step": step,
            "sources": [
                {"name": source.name, "epoch": count // bins, "bin": count % bins}
                for source, count, bins in zip(self.sources, taken, self.num_bins, strict=True)
            ],
            "shares": [[0, self.shares]],
            "skipped": [index + 1 for index in sorted(self.skipped)],
        }

    def _documents(self, source: int, number: int) -> list[Place]:
        """(source, row) of every document of the bin number `number` of a source."""
        epoch, index = divmod(number, self.num_bins[source])
        return [(source, int(row)) for row in self.bins(source, epoch)[index]]

    def _step(self, index: int, first_bin: int, bins: list[list[Place]]) -> Step:
        size = self.batch.micro_size
        own = bins[self.data_rank :: self.data_size]
        most = -(-len(bins) // self.data_size)  # bins of the rank that has most
        num_micro_batches = -(-most // size)
        chunks = [chain(own[size * number : size * (number + 1)]) for number in range(num_micro_batches)]
        parts: tuple[tuple[int, int], ...] = ()
        if self.batch.pass_tokens is not None:
            chunks, parts = self._passes(bins, num_micro_batches)
        supervised, tokens = [0] * len(self.sources), [0] * len(self.sources)
        for source, row in (place for documents in bins for place in documents):
            supervised[source] += int(self.sources[source].supervised[row])
            tokens[source] += int(self.sources[source].lengths[row])
        return Step(
            index=index,
            micro_batches=tuple(map(self._batch, chunks)),
            num_supervised=sum(supervised),
            num_tokens=sum(tokens),
            source_supervised=tuple(supervised),
            source_tokens=tuple(tokens),
            first_bin=first_bin,
            parts=parts,
        )

    def _passes(
        self, bins: list[list[Place]], num_micro_batches: int
    ) -> tuple[list[list[Place]], tuple[tuple[int, int], ...]]:
        """This rank's micro-batches in passes of at most `batch.pass_tokens`, and the place of each pass.

        All ranks take as many passes as the one that needs most: each knows the lengths of all documents.
        """
        size, passes, parts = self.batch.micro_size, [], []
        for number in range(num_micro_batches):
            of_ranks = []
            for rank in range(self.data_size):
                taken = bins[rank :: self.data_size][size * number : size * (number + 1)]
                of_ranks.append(self._split(chain(taken)))
            own = of_ranks[self.data_rank]
            for part in range(max(1, max(map(len, of_ranks)))):
                passes.append(own[part] if part < len(own) else [])
                parts.append((number, part))
        return passes, tuple(parts)

    def _split(self, documents: list[Place]) -> list[list[Place]]:
        """So many documents together as `batch.pass_tokens` allows; padding counts.

        In their order, or, one document a row, the longest first: rows of like length have little padding. Where one
        pass holds them all, nothing changes.
        """
        assert self.batch.pass_tokens is not None
        ordered = documents
        if not self.packed:
            ordered = sorted(documents, key=lambda place: -int(self.sources[place[0]].lengths[place[1]]))
        passes: list[list[Place]] = []
        longest = tokens = 0
        for source, row in ordered:
            length = int(self.sources[source].lengths[row])
            longest = max(longest, length)
            tokens = tokens + length if self.packed else longest * (len(passes[-1]) + 1 if passes else 1)
            if not passes or tokens > self.batch.pass_tokens:
                passes.append([])
                longest = tokens = length
            passes[-1].append((source, row))
        return passes if len(passes) != 1 else [documents]

    def _batch(self, documents: list[Place]) -> Batch:
        """Lay documents out; none at all where this rank has no bin left."""
        if not documents:
            return Batch.empty()
        rows = [self.sources[source].row(row) for source, row in documents]
        return (lay_packed if self.packed else lay_one_a_row)(rows, documents)


def chain(bins: Iterable[list[Place]]) -> list[Place]:
    """The documents of several bins, one behind the other."""
    return [place for documents in bins for place in documents]


def _layout(rows: list[tuple[np.ndarray, np.ndarray]], documents: list[Place], offsets: np.ndarray) -> dict[str, Any]:
    """What both layouts share. `offsets` [documents]: flat position at which each document begins."""
    lengths = [len(ids) for ids, _ in rows]
    positions, targets, sources = [], [], []
    for (ids, trained), (source, _), offset in zip(rows, documents, offsets.tolist(), strict=True):
        said = np.flatnonzero(trained[1:])  # places that predict a trained token; the first token is no target
        positions.append(said + offset)
        targets.append(ids[1:][said])
        sources.append(np.full(len(said), source))
    return {
        "max_length": max(lengths),
        "positions": torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        "targets": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        "sources": torch.from_numpy(np.concatenate(sources).astype(np.int64)),
        "num_tokens": sum(lengths),
        "documents": tuple(documents),
        "lengths": tuple(lengths),
    }


def lay_packed(rows: list[tuple[np.ndarray, np.ndarray]], documents: list[Place]) -> Batch:
    """All documents behind one another in one row, without padding."""
    boundaries = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([ids for ids, _ in rows]).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(ids)) for ids, _ in rows]))[None],
        attention_mask=None,
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        **_layout(rows, documents, boundaries[:-1]),
    )


def lay_one_a_row(rows: list[tuple[np.ndarray, np.ndarray]], documents: list[Place]) -> Batch:
    """One document a row, filled up at its end to the longest."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for index, (ids, _) in enumerate(rows):
        input_ids[index, : len(ids)] = ids
        mask[index, : len(ids)] = True
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).repeat(len(rows), 1),
        attention_mask=torch.from_numpy(mask),
        cu_seqlens=None,
        **_layout(rows, documents, np.arange(len(rows)) * width),
    )


def pin(step: Step) -> Step:
    """The step with its tensors in pinned memory, so that copies to the GPU wait for nothing."""

    def pinned(batch: Batch) -> Batch:
        tensors: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), torch.Tensor)
        }
        return dataclasses.replace(batch, **tensors)

    return dataclasses.replace(step, micro_batches=tuple(map(pinned, step.micro_batches)))


class Prefetch:
    """The steps `first` to `last` (not included) of a plan, the next ones made on a thread meanwhile.

    An error on the thread is raised in the loop that takes the steps. Leaving the loop ends the thread.
    """

    def __init__(self, plan: Plan, first: int, last: int, ahead: int = 2) -> None:
        self.plan, self.first, self.last, self.ahead = plan, first, last, ahead

    def __iter__(self) -> Iterator[Step]:
        ready: queue.Queue[Step | BaseException] = queue.Queue(self.ahead)
        stopped = threading.Event()

        def put(item: Step | BaseException) -> None:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def make() -> None:
            try:
                for index in range(self.first, self.last):
                    if stopped.is_set():
                        return
                    step = self.plan.step(index)
                    put(pin(step) if torch.cuda.is_available() else step)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=make, name="prefetch", daemon=True)
        thread.start()
        try:
            for index in range(self.first, self.last):
                heartbeat.mark("data", index + 1)
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
