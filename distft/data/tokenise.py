"""One source to tokens: its rows parsed, turned into documents and tokenised, by several processes where that pays."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distft.data.cache import REJECTED, SCHEMA, TOKENS, list_column, number_column, numbers, text_column
from distft.data.encoder import Encoder, Result
from distft.data.formats import Block
from distft.data.progress import Progress
from distft.data.rows import BadRow, Document, Row, Unfit
from distft.data.sources import SourceSpec, read_rows
from distft.errors import UserMistake
from distft.parent import follow

LOOKED_AT = 32  # documents that the encoder looks at before the rest is read
HOPELESS = 2000  # rows rejected one after another from the first on: the rest is not read
SMALL = 1 << 23  # bytes of a source below which starting processes costs more than it saves
BLOCKS_A_BATCH = 8


class EncodedBlock(NamedTuple):
    """What a worker makes of one block."""

    batch: pa.RecordBatch
    rows: int  # rows that became documents
    bad: list[BadRow]
    excluded: int
    notes: Counter[str]
    size: int


@dataclass
class Tally:
    """What became of a source's rows, counted while they pass."""

    spec: SourceSpec
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    excluded: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, dict[str, Any]] = field(default_factory=dict)  # by reason: first places and a detail

    def add(self, block: EncodedBlock) -> None:
        self.rows += block.rows
        self.excluded += block.excluded
        self.documents += block.batch.num_rows
        self.tokens += len(block.batch.column("ids").values)
        self.supervised += int(numbers(block.batch.column("supervised"), np.int32).sum())
        self.notes += block.notes
        for bad in block.bad:
            self.reject(bad)

    def reject(self, bad: BadRow) -> None:
        self.rejected[bad.reason] += 1
        first = self.first.setdefault(bad.reason, {"places": [], "detail": bad.detail})
        if len(first["places"]) < 5:
            first["places"].append(self.spec.place(bad))

    def report(self) -> dict[str, Any]:
        """As plain values."""
        # Not dataclasses.asdict: before Python 3.12 it turns a Counter into one that counts pairs.
        counts = {name: value for name, value in vars(self).items() if name != "spec"}
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()}
        return {"counted": self.spec.counted, **plain}

    @property
    def hopeless(self) -> bool:
        return self.rows == 0 and self.rejected.total() >= HOPELESS


def tokenise(spec: SourceSpec, encoder: Encoder, folder: Path, workers: Any) -> dict[str, Any]:
    """Write the tokens and the rejected rows of one source into a folder; returns the report."""
    documents = first_documents(spec)
    if documents:
        encoder.check(documents)
    tally, total = Tally(spec), spec.size()
    num_workers = num_cores() if workers == "auto" else int(workers)
    with ExitStack() as stack:
        writer = stack.enter_context(pa.ipc.new_file(str(folder / TOKENS), SCHEMA))
        rejected = stack.enter_context((folder / REJECTED).open("w", encoding="utf-8"))
        progress = stack.enter_context(Progress(f"Tokenising {spec.name}", total))
        waiting: list[pa.RecordBatch] = []
        for block in encoded_blocks(spec, encoder, num_workers if total > SMALL else 1):
            tally.add(block)
            waiting.append(block.batch)
            if len(waiting) == BLOCKS_A_BATCH:
                write_batches(writer, waiting)
            rejected.writelines(line_of(spec, bad) for bad in block.bad)
            progress.advance(block.size)
            if tally.hopeless:
                break
        write_batches(writer, waiting)
    if spec.excluded and not tally.excluded and not tally.hopeless:
        example = next((row.id for row in read_rows(spec) if isinstance(row, Row)), "none")
        raise UserMistake(
            f"{spec.knob}exclude_ids={spec.exclude_ids} names no row of {spec.path}: ids there look like "
            f"{next(iter(spec.excluded))!r}, those of the rows like {example!r}. Name the rows' id column by "
            f"{spec.knob}columns.id, or drop the knob."
        )
    return tally.report()


def line_of(spec: SourceSpec, bad: BadRow) -> str:
    """A rejected row as `rejected.jsonl` lists it."""
    return json.dumps({"source": spec.name, **bad._asdict()}, ensure_ascii=True) + "\n"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_batches(writer: pa.RecordBatchFileWriter, waiting: list[pa.RecordBatch]) -> None:
    """Write small batches as one: fewer of them make an open file's index smaller."""
    if waiting:
        table = pa.Table.from_batches(waiting).combine_chunks()
        for batch in table.to_batches():
            writer.write_batch(batch)
        waiting.clear()


def first_documents(spec: SourceSpec) -> list[Document]:
    """The first documents of a source, at most LOOKED_AT."""
    documents: list[Document] = []
    for row in read_rows(spec):
        if isinstance(row, Row):
            try:
                documents.append(spec.columns.document(row.value))
            except Unfit:
                continue
        if len(documents) == LOOKED_AT:
            break
    return documents


def encoded_blocks(spec: SourceSpec, encoder: Encoder, num_workers: int) -> Iterator[EncodedBlock]:
    """The blocks of a source, encoded, in order; by several processes where `num_workers` > 1.

    This process encodes the first few itself, until one of the others is up. At most a few blocks a worker are held at
    a time, so that memory stays bounded whatever the source's size.
    """
    bare = dataclasses.replace(spec)  # without the table or the ids that this process may have read
    if num_workers == 1:
        yield from (encode_block(block, spec, encoder) for block in spec.blocks())
        return
    import multiprocessing

    # Not fork: the tokenizer's threads and torch's may hold locks in this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distft.data.tokenise", "tokenizers", "transformers.utils.chat_template_utils"])
    with ProcessPoolExecutor(num_workers, context, start_worker, (bare, encoder)) as pool:
        waiting: deque[Future[EncodedBlock]] = deque()
        try:
            starting = [pool.submit(os.getpid) for _ in range(num_workers)]
            for number, block in enumerate(spec.blocks()):
                if number < 2 * num_workers and not any(future.done() for future in starting):
                    yield encode_block(block, spec, encoder)
                    continue
                waiting.append(pool.submit(work, block))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserMistake(
                f"A process that tokenises {spec.name} was killed, most likely for want of memory. Lower data.workers "
                f"(now {num_workers})."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker: tuple[SourceSpec, Encoder] | None = None  # of this process, set once when it starts


def start_worker(spec: SourceSpec, encoder: Encoder) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    follow(os.getppid(), signal.SIGKILL)  # the fork server, which ends with whoever tokenises
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process: there is a process a core
    _worker = spec, encoder


def work(block: Block) -> EncodedBlock:
    assert _worker is not None
    return encode_block(block, *_worker)


def encode_block(block: Block, spec: SourceSpec, encoder: Encoder) -> EncodedBlock:
    """Parse, convert and tokenise the rows of one block."""
    good: list[Row] = []
    documents: list[Document] = []
    bad: list[BadRow] = []
    excluded = 0
    for row in block.parsed():
        settled = spec.settle(row)
        if settled is None:
            excluded += 1
        elif isinstance(settled, BadRow):
            bad.append(settled)
        else:
            try:
                documents.append(spec.columns.document(settled.value))
                good.append(settled)
            except Unfit as fault:
                bad.append(bad_row(settled, fault))
    results = encoder.encode(documents)
    bad += [bad_row(row, result.unfit) for row, result in zip(good, results, strict=True) if result.unfit]
    bad.sort(key=lambda row: row.number)
    notes = Counter(note for result in results for note in result.notes)
    num_rows = sum(1 for result in results if result.documents)
    return EncodedBlock(record_batch(good, documents, results), num_rows, bad, excluded, notes, block.size)


def bad_row(row: Row, fault: Unfit) -> BadRow:
    return BadRow(row.number, fault.reason, fault.detail, row.id, row.file)


def record_batch(good: list[Row], documents: list[Document], results: list[Result]) -> pa.RecordBatch:
    encoded, hashes, ids = [], [], []
    for row, document, result in zip(good, documents, results, strict=True):
        if not result.documents:
            continue
        several, content = len(result.documents) > 1, document.content_hash()
        for index, part in enumerate(result.documents):
            encoded.append(part)
            hashes.append(content)
            ids.append(f"{row.id}#{index}" if several else row.id)
    return pa.record_batch(
        [
            list_column([part.ids for part in encoded]),
            list_column([[place for span in part.spans for place in span] for part in encoded]),
            number_column(np.asarray([part.supervised for part in encoded], dtype=np.int32)),
            number_column(np.asarray(hashes, dtype=np.uint64)),
            text_column(ids),
        ],
        schema=SCHEMA,
    )
