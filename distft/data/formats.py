"""The file formats, read as a stream of blocks so that memory stays bounded and blocks can be parsed elsewhere."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from distft.data.rows import BadRow, Row
from distft.errors import UserMistake

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 512
READ_CHARS = 1 << 20
LONGEST_ROW = 1 << 23  # bytes
TOO_LARGE = "longer than data.max_row_bytes"
LONGEST_LINE = 1 << 20  # characters of a text file's line that are kept together


class Block(NamedTuple):
    """Some records of one file: `lines` still to be parsed, or rows."""

    file: str
    number: int  # of the first record
    rows: tuple[Row | BadRow, ...] = ()
    lines: bytes = b""
    size: int = 0  # bytes of the file that were read for it

    def parsed(self) -> Iterator[Row | BadRow]:
        """The records; lines are parsed here, in whichever process this runs."""
        yield from self.rows
        if self.lines:
            for number, line in enumerate(self.lines.split(b"\n"), start=self.number):
                if line and not line.isspace():
                    yield _json_line(number, line, self.file)


def _json_line(number: int, line: bytes, file: str) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(number, "invalid UTF-8", f"byte {error.start}", file=file)
    except json.JSONDecodeError as error:
        return BadRow(number, "broken JSON", f"{error.msg}, column {error.colno}", file=file)
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        return BadRow(number, "broken JSON", str(error), file=file)
    return _row(number, value, file)


def _row(number: int, value: Any, file: str, key: str | None = None) -> Row | BadRow:
    """A row with its id still open: sources.py settles it."""
    if not isinstance(value, dict):
        return BadRow(number, "wrong type", f"{type(value).__name__}, not an object", id=key or "", file=file)
    if not value:
        return BadRow(number, "empty", id=key or "", file=file)
    return Row(number, key or "", value, file)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text(path: Path) -> Iterator[str]:
    """Decoded pieces of a file; bytes that are no UTF-8 become lone surrogates, which rows.py refuses row by row."""
    import io

    with _open(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        while piece := text.read(READ_CHARS):
            yield piece


def read_jsonl(path: Path, longest: int = LONGEST_ROW) -> Iterator[Block]:
    """One JSON object a line; a line of more than `longest` bytes is passed by piece by piece."""
    number, held, size = 1, list[bytes](), 0
    with _open(path) as stream:
        while line := stream.readline(longest + 1):
            too_long = len(line) > longest and not line.endswith(b"\n")
            if too_long or size >= BLOCK_BYTES:
                yield Block(path.name, number, lines=b"".join(held), size=size)
                number, held, size = number + len(held), [], 0
            if too_long:
                read = len(line) + _rest_of_line(stream)
                bad = BadRow(number, TOO_LARGE, f"{read:,} bytes", file=path.name)
                yield Block(path.name, number, rows=(bad,), size=read)
                number += 1
            else:
                held.append(line)
                size += len(line)
    if held:
        yield Block(path.name, number, lines=b"".join(held), size=size)


def _rest_of_line(stream: IO[bytes]) -> int:
    """Read to the end of a line; its bytes."""
    length = 0
    while piece := stream.readline(READ_CHARS):
        length += len(piece)
        if piece.endswith(b"\n"):
            break
    return length


def read_json(path: Path) -> Iterator[Block]:
    """A list of objects, or an object of objects whose keys are the ids; the file is never held as a whole.

    Raises:
        UserMistake: the file is broken: what follows the fault cannot be told apart.
    """
    yield from _in_blocks(_json_records(path), path.name, path.stat().st_size)


class _Window:
    """The part of a JSON file that is being looked at; grows while a value is cut by its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.pieces, self.decoder = path, _text(path), json.JSONDecoder()
        self.text, self.at, self.lines, self.more = "", 0, 1, True

    def grow(self) -> bool:
        """Read on, at least as much as is held, so that a long value is tried few times."""
        self.lines += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :]
        self.at, wanted = 0, max(1, len(self.text) // READ_CHARS)
        pieces = list(islice(self.pieces, wanted))
        self.text += "".join(pieces)
        self.more = bool(pieces)
        return self.more

    def skip_space(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The next JSON value."""
        self.skip_space()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.grow():
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if not (cut and self.grow()):
                    raise self.broken(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise self.broken(str(error), self.at) from None

    def expect(self, wanted: str) -> str:
        found = self.skip_space()
        if not found or found not in wanted:
            raise self.broken(f"expected one of {wanted!r}, found {found or 'the end of the file'!r}", self.at)
        self.at += 1
        return found

    def broken(self, message: str, position: int) -> UserMistake:
        line = self.lines + self.text.count("\n", 0, position)
        return UserMistake(f"data.path: {self.path} is broken JSON at line {line}: {message}. Mend the file there.")


def _json_records(path: Path) -> Iterator[Row | BadRow]:
    window = _Window(path)
    start = window.skip_space()
    if not start or start not in "[{":
        raise window.broken("a list of objects, or an object of objects by id, is needed", window.at)
    window.at += 1
    close = "]" if start == "[" else "}"
    number = 1
    if window.skip_space() == close:
        return
    while True:
        key = None
        if start == "{":
            key = window.value()
            if not isinstance(key, str):
                raise window.broken("a key is needed", window.at)
            window.expect(":")
        yield _row(number, window.value(), path.name, key)
        number += 1
        if window.expect("," + close) == close:
            return


def read_csv(path: Path) -> Iterator[Block]:
    """Comma-separated values with a header line; tabs for `.tsv`. Every value is text."""
    yield from _in_blocks(_csv_records(path), path.name, path.stat().st_size)


def _csv_records(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(number, "broken CSV", str(error), file=path.name)
            continue
        if not fields:
            continue
        if header is None:
            header = fields
        elif len(fields) != len(header):
            yield BadRow(number, "broken CSV", f"{len(fields)} fields under {len(header)} columns", file=path.name)
        else:
            yield Row(number, "", dict(zip(header, fields, strict=True)), path.name)


def _lines(path: Path) -> Iterator[str]:
    rest = ""
    for piece in _text(path):
        *lines, rest = (rest + piece).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def read_parquet(path: Path) -> Iterator[Block]:
    """Rows of a Parquet file, a batch at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            total, number = max(1, file.metadata.num_rows), 1
            for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                rows = tuple(_row(number + index, value, path.name) for index, value in enumerate(batch.to_pylist()))
                yield Block(path.name, number, rows=rows, size=path.stat().st_size * len(rows) // total)
                number += len(rows)
    except pyarrow.ArrowException as error:
        raise UserMistake(f"data.path: {path} cannot be read as Parquet: {error}") from None


def read_text(path: Path, document_chars: int) -> Iterator[Block]:
    """Documents of a plain text file: paragraphs, gathered until they have `document_chars` characters.

    A document ends at a blank line once it is that long, and at any line end once it is four times as long; so it is
    about a bin long, keeps its inner order, and no file has to fit in memory. The file's end ends it too.
    """

    def records() -> Iterator[Row]:
        held: list[str] = []
        size, first = 0, 1
        for number, line in enumerate(_text_lines(path), start=1):
            if not held:
                first = number
            held.append(line)
            size += len(line)
            if (size >= document_chars and not line.strip()) or size >= 4 * document_chars:
                yield Row(first, "", {"text": "".join(held).strip("\n")}, path.name)
                held, size = [], 0
        if "".join(held).strip():
            yield Row(first, "", {"text": "".join(held).strip("\n")}, path.name)

    yield from _in_blocks(records(), path.name, path.stat().st_size)


def _text_lines(path: Path) -> Iterator[str]:
    for line in _lines(path):
        line = line.replace("\r\n", "\n")
        for start in range(0, len(line), LONGEST_LINE):
            yield line[start : start + LONGEST_LINE]


def read_table(table: Any, name: str) -> Iterator[Block]:
    """Rows of a `datasets.Dataset`."""
    for start in range(0, len(table), BLOCK_ROWS):
        columns = table[start : start + BLOCK_ROWS]
        names = list(columns)
        values = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rows = tuple(_row(number, value, name) for number, value in enumerate(values, start=start + 1))
        yield Block(name, start + 1, rows=rows, size=len(rows))


def _in_blocks(records: Iterable[Row | BadRow], file: str, total_bytes: int) -> Iterator[Block]:
    """Cut a stream of records into blocks; `size` is an estimate that ends at the file's own."""
    records = iter(records)
    told = 0
    while rows := tuple(islice(records, BLOCK_ROWS)):
        size = min(total_bytes - told, sum(_weight(row) for row in rows))
        told += size
        yield Block(file, rows[0].number, rows=rows, size=size)


def _weight(row: Row | BadRow) -> int:
    """About the bytes that a record had in its file."""
    return 16 if isinstance(row, BadRow) else sum(len(str(value)) + len(key) + 6 for key, value in row.value.items())


READERS: dict[str, Callable[[Path], Iterator[Block]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
}
