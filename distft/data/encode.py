"""Data preparation: rows of every source to token ids, in parallel, once; the cache says what was made and why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from distft.config.schema import Run
from distft.data import encoder as encoder_module
from distft.data import formats, rows, template
from distft.data.cache import (
    KEY,
    MANIFEST,
    REJECTED,
    SCHEMA,
    TOKENS,
    EncodedSource,
    PreparedData,
    digest,
    digest_of_files,
    fault_of,
    list_column,
    new_folder,
    number_column,
    numbers,
    open_prepared,
    read_key,
    reason_for_miss,
    text_column,
)
from distft.data.encoder import TOO_LONG, Encoder, MakeEncoder, Result
from distft.data.formats import Block
from distft.data.progress import Progress, say
from distft.data.rows import BadRow, Document, Row, Unfit
from distft.data.sources import SourceSpec, cache_folder, eval_source_of, read_rows, sources_of
from distft.data.template import settle_template
from distft.errors import UserMistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["EncodedSource", "PreparedData", "open_prepared", "prepare", "settle_template"]

LOOKED_AT = 32  # documents that the encoder looks at before the rest is read
HOPELESS = 2000  # rows rejected one after another from the first on: the rest is not read
SMALL = 1 << 20  # bytes of a source below which starting processes costs more than it saves
BLOCKS_A_BATCH = 8


def prepare(
    run: Run, tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path, out: Path, make_encoder: MakeEncoder
) -> PreparedData:
    """Make or find the tokenised form of a run's data; rejected rows go to `<out>/rejected.jsonl`.

    Args:
        tokenizer: with its chat template settled (objective=sft).
        tokenizer_folder: where that tokenizer was saved.
        make_encoder: the objective's.

    Raises:
        UserMistake: no row can be used, too many cannot, or none is left for training or evaluation.
    """
    if not tokenizer.is_fast:
        raise UserMistake(
            f"model.path={tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) is no fast one, so which "
            "tokens come from which words cannot be told. Save it as tokenizer.json, or take a model that has one."
        )
    store = cache_folder(run.data) / "data"
    encoder = make_encoder(run, tokenizer, tokenizer_folder)
    specs = sources_of(run.data, run.objective.name)
    eval_spec = eval_source_of(run.data, run.objective.name)
    fraction = 0.0 if eval_spec else run.data.eval_fraction
    sources = []
    (out / REJECTED).unlink(missing_ok=True)
    for spec in [*specs, *([eval_spec] if eval_spec else [])]:
        folder = tokenised(spec, encoder, store, run.data.workers)
        report = read_key(folder)["report"]
        append_rejected(folder / REJECTED, out / REJECTED)
        if report["notes"]:
            say(f"{spec.name}: " + "; ".join(f"{count:,} {note}" for note, count in sorted(report["notes"].items())))
        refuse_too_long(spec, report, out / REJECTED)
        refuse_many_rejected(spec, report, run.data.max_rejected, out / REJECTED)
        part = 1.0 if spec is eval_spec else fraction
        sources.append({"name": spec.name, "weight": spec.weight, "folder": folder.name, "eval_fraction": part})
    manifest = {"sources": sources}
    path = store / digest(manifest)
    path.mkdir(exist_ok=True)
    unfinished = path / f"{MANIFEST}.tmp-{os.getpid()}"
    unfinished.write_text(json.dumps(manifest, indent=2))
    unfinished.replace(path / MANIFEST)
    prepared = open_prepared(path)
    refuse_empty(prepared, run, fraction)
    return prepared


def refuse_empty(prepared: PreparedData, run: Run, fraction: float) -> None:
    if not prepared.train:
        reason = "all are held out for evaluation; lower data.eval_fraction" if prepared.eval else "check data.path"
        raise UserMistake(f"No row is left to train on: {reason}.")
    if not prepared.eval and (fraction > 0 or run.data.eval_path):
        raise UserMistake(
            "No row is left for evaluation: the data has a single different row. Set data.eval_path, or "
            "data.eval_fraction=0 for no evaluation."
        )


# --- the cache --------------------------------------------------------------------------------------------------------


def tokenised(spec: SourceSpec, encoder: Encoder, store: Path, workers: Any = "auto") -> Path:
    """The folder with the tokens of one source: found, or made; says which and why."""
    parts = key_of(spec, encoder)
    folder = store / digest(parts)
    place = Path(spec.path).expanduser()
    label = str(place.absolute()) if place.exists() else f"{spec.path} {spec.split}"
    if folder.exists():
        fault = fault_of(folder, contents=True)
        if not fault:
            report = read_key(folder)["report"]
            say(f"{spec.name}: {report['rows']:,} rows found tokenised in {folder}")
            return folder
        say(f"{spec.name}: {folder} {fault}; tokenised again")
    else:
        say(f"{spec.name}: tokenised {reason_for_miss(store, label, parts)}")
    with new_folder(folder) as staging:
        started = time.perf_counter()
        report = tokenise(spec, encoder, staging, workers)
        report["seconds"] = round(time.perf_counter() - started, 3)
        tokens = staging / TOKENS
        key = {
            "label": label,
            "parts": parts,
            "made": time.time(),
            "bytes": tokens.stat().st_size,
            "tokens_hash": digest_of_files([(TOKENS, tokens)]),
            "report": report,
        }
        (staging / KEY).write_text(json.dumps(key, indent=2), encoding="utf-8")
    return folder


def key_of(spec: SourceSpec, encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the tokens, by the name under which a change is told."""
    if spec.format in ("saved", "hub"):
        contents = spec.table._fingerprint
    else:
        contents = digest_of_files((file.name, file) for file in spec.files)
    settings = {
        setting.name: getattr(encoder, setting.name)
        for setting in dataclasses.fields(encoder)  # type: ignore[arg-type]
        if setting.name != "tokenizer"
    }
    modules = [rows, formats, template, encoder_module, inspect.getmodule(type(encoder))]
    code = [(str(module.__name__), Path(str(module.__file__))) for module in modules if module is not None]
    libraries = {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")}
    return {
        "data": contents,
        "data.format": [spec.format, spec.document_chars if spec.format == "text" else 0],
        "data.columns": digest(spec.columns.templates),
        "data.exclude_ids": digest(sorted(spec.excluded)),
        "tokenizer": digest_of_files([("tokenizer.json", Path(encoder.tokenizer.file))]),
        "objective": type(encoder).__name__,
        **{name: digest(dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v) for name, v in settings.items()},  # type: ignore[arg-type]
        "distft's code": digest_of_files(code),
        "libraries": digest(libraries),
    }


# --- making it --------------------------------------------------------------------------------------------------------


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
            self.rejected[bad.reason] += 1
            first = self.first.setdefault(bad.reason, {"places": [], "detail": bad.detail})
            if len(first["places"]) < 5:
                first["places"].append(bad.number)

    @property
    def hopeless(self) -> bool:
        return self.rows == 0 and self.rejected.total() >= HOPELESS


def tokenise(spec: SourceSpec, encoder: Encoder, folder: Path, workers: Any) -> dict[str, Any]:
    """Write the tokens and the rejected rows of one source into a folder; returns the report."""
    documents = first_documents(spec)
    if documents:
        encoder.check(documents)
    tally, total = Tally(), spec.size()
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
            for bad in block.bad:
                record = {"source": spec.name, **bad._asdict()}
                rejected.write(json.dumps(record, ensure_ascii=True) + "\n")
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
    # Not dataclasses.asdict: before Python 3.12 it turns a Counter into one that counts pairs.
    return {**vars(tally), "notes": dict(tally.notes), "rejected": dict(tally.rejected)}


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

    At most a few blocks a worker are held at a time, so that memory stays bounded whatever the source's size.
    """
    bare = dataclasses.replace(spec)  # without the table or the ids that this process may have read
    if num_workers == 1:
        yield from (encode_block(block, spec, encoder) for block in spec.blocks())
        return
    import multiprocessing

    # Not fork: the tokenizer's threads and torch's may hold locks in this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distft.data.encode", "tokenizers", "transformers.utils.chat_template_utils"])
    with ProcessPoolExecutor(num_workers, context, start_worker, (bare, encoder)) as pool:
        waiting: deque[Future[EncodedBlock]] = deque()
        try:
            for block in spec.blocks():
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
        several = len(result.documents) > 1
        for index, part in enumerate(result.documents):
            encoded.append(part)
            hashes.append(document.content_hash())
            ids.append(f"{row.id}#{index}" if several else row.id)
    return pa.record_batch(
        [
            list_column([part.ids for part in encoded]),
            list_column([np.asarray(part.spans, dtype=np.int32).reshape(-1) for part in encoded]),
            number_column(np.asarray([part.supervised for part in encoded], dtype=np.int32)),
            number_column(np.asarray(hashes, dtype=np.uint64)),
            text_column(ids),
        ],
        schema=SCHEMA,
    )


# --- rejected rows ----------------------------------------------------------------------------------------------------


def append_rejected(source: Path, target: Path) -> None:
    """Put a source's rejected rows behind those of the others. Nothing is written where there are none."""
    if source.stat().st_size:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open(encoding="utf-8") as lines, target.open("a", encoding="utf-8") as stream:
            shutil.copyfileobj(lines, stream)


def refuse_too_long(spec: SourceSpec, report: dict[str, Any], file: Path) -> None:
    """Stop where `data.too_long=refuse` met a row that is."""
    if count := report["rejected"].get(TOO_LONG):
        first = report["first"][TOO_LONG]
        raise UserMistake(
            f"{count:,} rows of {spec.name} are {TOO_LONG}, the first of them row {first['places'][0]} with "
            f"{first['detail']} (data.too_long=refuse). All are listed in {file}: raise data.sequence_length, or set "
            "data.too_long to truncate, split or drop."
        )


def refuse_many_rejected(spec: SourceSpec, report: dict[str, Any], max_rejected: float, file: Path) -> None:
    """Stop where a larger share than `data.max_rejected` cannot be used; otherwise say how many were left out."""
    rejected = sum(report["rejected"].values())
    total = report["rows"] + rejected + report["notes"].get("dropped as too long", 0)
    if not rejected:
        if not report["rows"]:
            but = " but those that exclude_ids leaves out" if report["excluded"] else ""
            raise UserMistake(f"{spec.knob}path={spec.path} has no rows{but}.")
        return
    reasons = []
    for reason, count in sorted(report["rejected"].items(), key=lambda item: -item[1]):
        places, detail = report["first"][reason]["places"], report["first"][reason]["detail"]
        where = ", ".join(map(str, places)) + (", …" if count > len(places) else "")
        reasons.append(f"{count:,} {reason} (row {where}{f'; the first: {detail}' if detail else ''})")
    told = f"{rejected:,} of {total:,} rows of {spec.name} cannot be used: {'; '.join(reasons)}."
    if rejected > max_rejected * total:
        raise UserMistake(
            f"{told} That is more than data.max_rejected={max_rejected} allows. They are listed in {file}: mend them, "
            "or raise data.max_rejected."
        )
    say(f"{told} They are left out and listed in {file}")
