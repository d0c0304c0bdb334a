"""Where rows come from: the sources of a run, and their rows as a stream."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from distft.cache import cache_folder
from distft.config.schema import Data, Run, Source
from distft.data.files import files_of, is_hub_id, load_from_hub, load_saved, read_ids
from distft.data.formats import LONGEST_ROW, READERS, TOO_LARGE, Block, read_jsonl, read_table, read_text
from distft.data.rows import (
    COLUMN_NAMES,
    COLUMN_TEMPLATES,
    SHAPES,
    BadRow,
    Columns,
    Row,
    Unfit,
    is_text,
    num_chars,
    trainable,
)
from distft.errors import UserMistake

CHARS_PER_TOKEN = 4  # of English under common tokenizers: makes documents of plain text about a bin long
LOOKED_AT = 100  # rows read to see whether the columns fit


@dataclass(frozen=True)
class SourceSpec:
    """One source, with everything settled that its files tell."""

    name: str
    knob: str  # where its path stands in the configuration, for messages
    format: str
    path: str
    files: tuple[Path, ...] = ()  # of the file formats, in the order of their names
    columns: Columns = field(default_factory=Columns)
    exclude_ids: str | None = None
    weight: float | None = None
    subset: str | None = None
    split: str = "train"
    document_chars: int = 4096  # format=text
    max_row_bytes: int = LONGEST_ROW

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Ids of rows to leave out."""
        return read_ids(Path(self.exclude_ids).expanduser()) if self.exclude_ids else frozenset()

    @cached_property
    def table(self) -> Any:
        """The `datasets.Dataset` of a saved or a hub data set."""
        if self.format == "saved":
            return load_saved(self.path, self.split, self.knob)
        return load_from_hub(self.path, self.subset, self.split, self.knob)

    def blocks(self) -> Iterator[Block]:
        """All records, some at a time, in order."""
        if self.format in ("saved", "hub"):
            yield from read_table(self.table, self.path)
            return
        for file in self.files:
            if self.format == "text":
                yield from read_text(file, self.document_chars)
            elif self.format == "jsonl":
                yield from read_jsonl(file, self.max_row_bytes)
            else:
                yield from READERS[self.format](file)

    def place(self, row: Row | BadRow) -> str:
        """The number of a row, with its file where there are several."""
        return str(row.number) if len(self.files) < 2 else f"{row.file}:{row.number}"

    @property
    def counted(self) -> str:
        """What a row's number counts."""
        return "line" if self.format in ("jsonl", "csv", "text") else "row"

    def size(self) -> int:
        """What the sizes of all blocks add up to: bytes, or rows of a table."""
        return len(self.table) if self.format in ("saved", "hub") else sum(file.stat().st_size for file in self.files)

    def settle(self, row: Row | BadRow) -> Row | BadRow | None:
        """The row with its id (the id column, else the key, else file and line); None where it is excluded."""
        seen = self.format in ("jsonl", "text")  # by their readers
        if not seen and isinstance(row, Row) and (size := num_chars(row.value)) > self.max_row_bytes:
            return BadRow(row.number, TOO_LARGE, f"{size:,} characters", row.id, row.file)
        given = self.columns.id_of(row.value) if isinstance(row, Row) else None
        if given is not None and not isinstance(given, (str, int, float)):
            return BadRow(row.number, "wrong type", f"the id is {type(given).__name__}", file=row.file)
        row = row._replace(id=str(given) if given is not None else row.id or self.place(row))
        if not row.id.isascii() and not is_text(row.id):
            return BadRow(row.number, "invalid UTF-8", "the id", file=row.file)
        return None if row.id in self.excluded else row


def sources_of(data: Data, objective: str) -> list[SourceSpec]:
    """The training sources of a run.

    Raises:
        UserMistake: a path, a format or a template that cannot be used.
    """
    if not data.sources:
        return [spec_of(Source(**_own(data), path=data.path), "data.", data, objective)]
    listed = [spec_of(source, f"data.sources[{i}].", data, objective) for i, source in enumerate(data.sources)]
    names = [spec.name for spec in listed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserMistake(f"data.sources: two sources are called {', '.join(twice)}. Give each its own name.")
    return listed


def eval_source_of(data: Data, objective: str) -> SourceSpec | None:
    """The source of evaluation rows where `data.eval_path` names one."""
    if not data.eval_path:
        return None
    own = {**_own(data), "exclude_ids": None, "split": data.eval_split}
    return spec_of(Source(**own, path=data.eval_path), "data.eval_", data, objective)


def _own(data: Data) -> dict[str, Any]:
    return {name: getattr(data, name) for name in ("format", "columns", "exclude_ids", "subset", "split")}


def spec_of(source: Source, knob: str, data: Data, objective: str) -> SourceSpec:
    """Settle one source: its format, its files, its templates."""
    path, format = source.path or "", source.format
    files: tuple[Path, ...] = ()
    if format == "python_docs":
        from distft.data.python_docs import rows_file

        files = (rows_file(cache_folder(data)),)
        format = "jsonl"
    elif not path:
        raise UserMistake(f"{knob}path is missing: name a file, a folder or a hub id.")
    elif format == "auto" and is_hub_id(path):
        format = "hub"
    elif format not in ("hub", "saved"):
        format, files = files_of(path, format, knob)
    spec = SourceSpec(
        name=source.name or Path(path or source.format).stem,
        knob=knob,
        format=format,
        path=path or source.format,
        files=files,
        columns=_columns(source.columns, knob),
        exclude_ids=source.exclude_ids,
        weight=source.weight,
        subset=source.subset,
        split=source.split,
        document_chars=CHARS_PER_TOKEN * data.sequence_length,
        max_row_bytes=data.max_row_bytes,
    )
    check_columns(spec, objective)
    return spec


def _columns(columns: dict[str, Any], knob: str) -> Columns:
    """Read the templates of `columns`; what they mean together is checked here, once."""
    known = COLUMN_TEMPLATES + COLUMN_NAMES
    for role, template in columns.items():
        if role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserMistake(f"{knob}columns.{role} is not known; roles are {', '.join(known)}.{hint}")
        if not isinstance(template, str):
            raise UserMistake(f"{knob}columns.{role} must be text, such as '{{{{ column }}}}'.")
    given = set(columns) - {"id"}
    answers, questions = given & {"assistant", "completion"}, given & {"user", "prompt"}
    alone = given & {"text", "messages"}
    if given and not (len(alone) == len(given) == 1 or (not alone and len(answers) == 1 and len(questions) <= 1)):
        raise UserMistake(
            f"{knob}columns has {', '.join(sorted(given))}: give either text, or messages, or assistant (or "
            "completion) with user (or prompt) and, if wanted, system."
        )
    try:
        return Columns(tuple(sorted(columns.items())))
    except jinja2.TemplateSyntaxError as error:
        raise UserMistake(f"{knob}columns: a template cannot be read: {error}") from None


def check_columns(spec: SourceSpec, objective: str) -> None:
    """Look at the first rows: a misspelt column is told before everything is read.

    Raises:
        UserMistake: none of the first rows fits the columns; names the nearest column.
    """
    faults: list[Unfit] = []
    rows = list(_first_rows(spec))
    for role, template in spec.columns.templates:
        if role in COLUMN_TEMPLATES and any(template in row.value for row in rows):
            raise UserMistake(
                f"{spec.knob}columns.{role}={template} names a column, but would stand as that very word in every row. "
                f"Write '{{{{ {template} }}}}'."
            )
    for row in rows:
        try:
            document = spec.columns.document(row.value)
        except Unfit as fault:
            faults.append(fault)
            continue
        if objective == "sft" and document.text:
            raise UserMistake(
                f"{spec.knob}path={spec.path} holds plain text, in which objective=sft finds no answer to train on. "
                f"Add objective=lm, or name question and answer by {spec.knob}columns.user and .assistant."
            )
        return
    if rows:
        raise UserMistake(_column_fault(spec, rows, faults[0]))


def _first_rows(spec: SourceSpec) -> Iterator[Row]:
    count = 0
    for block in spec.blocks():
        for row in block.parsed():
            count += 1
            if isinstance(row, Row):
                yield row
            if count >= LOOKED_AT:
                return


def _column_fault(spec: SourceSpec, rows: list[Row], fault: Unfit) -> str:
    present = sorted({column for row in rows for column in row.value})
    text = f"{spec.knob}path={spec.path}: none of the first {len(rows)} rows can be used: {fault.reason}"
    text += f" ({fault.detail})." if fault.detail else "."
    missing = sorted(spec.columns.variables() - set(present))
    for column in missing:
        near = difflib.get_close_matches(column.lower(), [name.lower() for name in present], n=1)
        nearest = [name for name in present if near and name.lower() == near[0]]
        text += f" There is no column {column!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ".")
    text += f" The rows have the columns {', '.join(present)}."
    if not spec.columns.templates:
        text += (
            f" Known are {'; '.join(' and '.join(shape) for shape in SHAPES)}. "
            f"For others give templates: '{spec.knob}columns={{user: \"{{{{ question }}}}\", assistant: …}}'."
        )
    return text


def read_rows(spec: SourceSpec) -> Iterator[Row | BadRow]:
    """All records of a source in order, good and bad, without the excluded ones."""
    for block in spec.blocks():
        for row in block.parsed():
            if (settled := spec.settle(row)) is not None:
                yield settled


def texts(run: Run) -> Iterator[str]:
    """The plain words of a run's training rows, the sources in turn: what `model=tiny` trains its tokenizer from."""
    turns = deque(_plain(spec, run.objective.name) for spec in sources_of(run.data, run.objective.name))
    while turns:
        source = turns.popleft()
        if (text := next(source, None)) is not None:
            yield text
            turns.append(source)


def _plain(spec: SourceSpec, objective: str) -> Iterator[str]:
    for row in read_rows(spec):
        if isinstance(row, Row):
            try:
                yield trainable(spec.columns.document(row.value), objective).plain()
            except Unfit:
                continue
