"""Tokenised data on disk: content-addressed folders of memory-mapped Arrow files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from distft.errors import UserMistake

TOKENS, KEY, REJECTED, MANIFEST = "tokens.arrow", "key.json", "rejected.jsonl", "manifest.json"
SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),  # first trained token, first one after it, and so on
        "supervised": pa.int32(),
        "hash": pa.uint64(),  # of the row's content
        "row_id": pa.string(),
    }
)
LEFTOVER_SECONDS = 24 * 3600
PIECE = 1 << 24


def digest(value: Any) -> str:
    """A hash of plain values that does not depend on their order in dictionaries."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of names, sizes and contents, in their order."""
    whole = xxhash.xxh3_128()
    for name, file in files:
        whole.update(json.dumps([name, file.stat().st_size]).encode())
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                whole.update(piece)
    return whole.hexdigest()


# Arrays pass between Arrow and NumPy as buffers: pyarrow's own conversions import pandas, half a second a process.


def numbers(array: pa.Array, dtype: type[np.generic]) -> np.ndarray:
    """A view of an Arrow array of numbers without nulls."""
    item = np.dtype(dtype).itemsize
    return (
        np.frombuffer(array.buffers()[1], dtype, count=len(array), offset=array.offset * item)
        if len(array)
        else np.zeros(0, dtype)
    )


def number_column(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def list_column(parts: Sequence[Sequence[int] | np.ndarray]) -> pa.ListArray:
    """A column of lists of int32."""
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    if all(isinstance(part, np.ndarray) for part in parts):
        values = np.concatenate(parts) if parts else np.zeros(0)
    else:
        values = np.fromiter(chain.from_iterable(parts), np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(number_column(offsets), number_column(values.astype(np.int32, copy=False)))


def text_column(values: Sequence[str]) -> pa.StringArray:
    encoded = [value.encode() for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


class TokenFile:
    """Rows of one Arrow file. Rows are read where they are asked for; memory holds the file's index alone."""

    def __init__(self, file: Path) -> None:
        self.reader = pa.ipc.open_file(pa.memory_map(str(file)))
        counts, lengths, supervised, hashes = [0], [], [], []
        for index in range(self.reader.num_record_batches):
            batch = self.reader.get_batch(index)
            counts.append(batch.num_rows)
            lengths.append(np.diff(numbers(batch.column("ids").offsets, np.int32)))
            supervised.append(numbers(batch.column("supervised"), np.int32))
            hashes.append(numbers(batch.column("hash"), np.uint64))
        self.starts = np.cumsum(counts)
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
        self.supervised = np.concatenate(supervised) if lengths else np.zeros(0, np.int32)
        self.hashes = np.concatenate(hashes) if lengths else np.zeros(0, np.uint64)
        self.open_batches: dict[int, tuple[np.ndarray, ...]] = {}

    def _place(self, row: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        return batch, row - int(self.starts[batch])

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [length] int32, spans [spans, 2] int32): views into the mapped file."""
        batch, at = self._place(row)
        if batch not in self.open_batches:
            columns = self.reader.get_batch(batch)
            ids, spans = columns.column("ids"), columns.column("spans")
            self.open_batches[batch] = tuple(
                numbers(part, np.int32) for column in (ids, spans) for part in (column.offsets, column.values)
            )
        id_offsets, ids, span_offsets, spans = self.open_batches[batch]
        return (
            ids[id_offsets[at] : id_offsets[at + 1]],
            spans[span_offsets[at] : span_offsets[at + 1]].reshape(-1, 2),
        )

    def row_id(self, row: int) -> str:
        batch, at = self._place(row)
        return str(self.reader.get_batch(batch).column("row_id")[at].as_py())


@dataclass(frozen=True)
class EncodedSource:
    """The rows of one source on one side (training or evaluation), tokenised."""

    name: str
    weight: float | None  # relative share of a step's bins; None: every row once an epoch
    tokens: TokenFile
    rows: np.ndarray  # [rows] int64, rows of the file that are on this side

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] int32 tokens."""
        return self.tokens.lengths[self.rows].astype(np.int32)

    @cached_property
    def supervised(self) -> np.ndarray:
        """[rows] int32 targets."""
        return self.tokens.supervised[self.rows].astype(np.int32)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [length] int32, trained [length] bool); the first token is no target, whatever it says."""
        ids, spans = self.tokens.row(int(self.rows[index]))
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in spans.tolist():
            trained[start:end] = True
        return ids, trained

    def row_id(self, index: int) -> str:
        """The row's id in its source; `#n` behind it where a row became several documents."""
        return self.tokens.row_id(int(self.rows[index]))


@dataclass(frozen=True)
class PreparedData:
    """All sources of a run, tokenised and divided."""

    train: list[EncodedSource]
    eval: list[EncodedSource]
    hash: str
    path: Path
    reports: list[dict[str, Any]]  # a source each: its name and what became of its rows


def open_prepared(path: Path) -> PreparedData:
    """Open what `prepare` made.

    Raises:
        UserMistake: the folder or a part of it is gone.
    """
    cure = "run the same command again, or `distft data prepare`, to make it anew"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserMistake(f"The tokenised data {path} cannot be read ({error}); {cure}.") from None
    train: list[EncodedSource] = []
    held_out: list[EncodedSource] = []
    reports = []
    for source in manifest["sources"]:
        folder = path.parent / source["folder"]
        fault = fault_of(folder, contents=False)
        if fault:
            raise UserMistake(f"The tokenised data of {source['name']}, {folder}, {fault}; {cure}.")
        tokens = TokenFile(folder / TOKENS)
        evaluated = held_out_rows(tokens.hashes, source["eval_fraction"])
        for side, mask in ((train, ~evaluated), (held_out, evaluated)):
            if mask.any():
                side.append(EncodedSource(source["name"], source["weight"], tokens, np.flatnonzero(mask)))
        reports.append({"name": source["name"], **read_key(folder)["report"]})
    return PreparedData(train, held_out, path.name, path, reports)


def held_out_rows(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """[rows] bool: rows for evaluation. Chosen by content, so that equal rows are on one side, whatever else there is.

    At least the row with the smallest hash, if there are two different ones.
    """
    if fraction <= 0 or not len(hashes):
        return np.zeros(len(hashes), dtype=bool)
    if fraction >= 1:
        return np.ones(len(hashes), dtype=bool)
    chosen = hashes < np.uint64(int(fraction * 2**64))
    if not chosen.any() and hashes.min() != hashes.max():
        chosen = hashes == hashes.min()
    return np.asarray(chosen)


def read_key(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / KEY).read_text(encoding="utf-8")))


def fault_of(folder: Path, contents: bool) -> str:
    """Why a folder cannot be used, or nothing. `contents`: also compare the hash of the tokens."""
    if not folder.is_dir():
        return "is gone"
    try:
        key = read_key(folder)
        file = folder / TOKENS
        if file.stat().st_size != key["bytes"]:
            return f"is cut short ({file.stat().st_size:,} of {key['bytes']:,} bytes)"
        if contents and digest_of_files([(TOKENS, file)]) != key["tokens_hash"]:
            return "has changed on disk"
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read ({error})"
    return ""


def reason_for_miss(store: Path, label: str, parts: Mapping[str, Any]) -> str:
    """Which parts of the key differ from the newest entry that was made from the same place."""
    newest: dict[str, Any] | None = None
    for file in store.glob(f"*/{KEY}"):
        try:
            key = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if key.get("label") == label and (newest is None or key["made"] > newest["made"]):
            newest = key
    if newest is None:
        return "for the first time"
    before = newest["parts"]
    changed = sorted(name for name in {*before, *parts} if before.get(name) != parts.get(name))
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest["made"]))
    return f"anew, changed since {made}: {', '.join(changed)}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name at the end, whole, or disappears. The first to finish wins."""
    store = folder.parent
    store.mkdir(parents=True, exist_ok=True)
    for leftover in store.glob("tmp-*"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    staging = store / f"tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        if folder.exists() and fault_of(folder, contents=True):
            folder.rename(store / f"{staging.name}-broken")
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(store / f"{staging.name}-broken", ignore_errors=True)
