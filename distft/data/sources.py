"""Where rows come from: the sources of a run, and their rows as a stream."""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from distft.config.schema import Data, Run, Source
from distft.data.formats import ENDINGS, READERS, Block, read_table, read_text
from distft.data.rows import COLUMN_NAMES, COLUMN_TEMPLATES, SHAPES, BadRow, Columns, Row, Unfit
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

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Ids of rows to leave out."""
        return read_ids(Path(self.exclude_ids).expanduser()) if self.exclude_ids else frozenset()

    @cached_property
    def table(self) -> Any:
        """The `datasets.Dataset` of a saved or a hub data set."""
        return _saved(self) if self.format == "saved" else _from_hub(self)

    def blocks(self) -> Iterator[Block]:
        """All records, some at a time, in order."""
        if self.format in ("saved", "hub"):
            yield from read_table(self.table, self.path)
            return
        for file in self.files:
            if self.format == "text":
                yield from read_text(file, self.document_chars)
            else:
                yield from READERS[self.format](file)

    def size(self) -> int:
        """What the sizes of all blocks add up to: bytes, or rows of a table."""
        return len(self.table) if self.format in ("saved", "hub") else sum(file.stat().st_size for file in self.files)

    def settle(self, row: Row | BadRow) -> Row | BadRow | None:
        """The row with its id (the id column, else the key, else file and line); None where it is excluded."""
        given = self.columns.id_of(row.value) if isinstance(row, Row) else None
        if given is not None and not isinstance(given, (str, int, float)):
            return BadRow(row.number, "wrong type", f"the id is {type(given).__name__}", file=row.file)
        place = str(row.number) if len(self.files) < 2 else f"{row.file}:{row.number}"
        row = row._replace(id=str(given) if given is not None else row.id or place)
        return None if row.id in self.excluded else row


def cache_folder(data: Data) -> Path:
    """`data.cache_dir`, else $DISTFT_CACHE, else ~/.cache/distft."""
    return Path(data.cache_dir or os.environ.get("DISTFT_CACHE") or "~/.cache/distft").expanduser().absolute()


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
    elif format == "auto" and _is_hub_id(path):
        format = "hub"
    elif format not in ("hub", "saved"):
        format, files = _files(path, format, knob)
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
    )
    check_columns(spec, objective)
    return spec


def _is_hub_id(path: str) -> bool:
    """A hub id is `name` or `owner/name` and no file; anything else is a path on this machine."""
    local = Path(path).expanduser()
    return not (
        local.exists()
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or any(mark in path for mark in "*?[")
        or local.suffix in (*ENDINGS, ".gz")
    )


def _files(path: str, format: str, knob: str) -> tuple[str, tuple[Path, ...]]:
    """The format and the files behind a path: a file, a folder of files, or a pattern."""
    place = Path(path).expanduser()
    if place.is_dir():
        if format == "auto" and any((place / name).exists() for name in ("state.json", "dataset_dict.json")):
            return "saved", ()
        found = sorted(file for file in place.rglob("*") if file.is_file() and _format_of(file))
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(place).parts)]
    elif place.exists():
        found = [place]
    else:
        found = sorted(Path(file) for file in glob.glob(str(place), recursive=True))
        if not found:
            raise UserMistake(f"{knob}path={path}: there is no such file or folder.{_nearest_file(place)}")
    if format != "auto":
        found = [file for file in found if not place.is_dir() or _format_of(file) == format]
        if not found:
            raise UserMistake(f"{knob}path={path}: the folder holds no {format} file.")
        return format, tuple(found)
    formats = sorted({_format_of(file) or f"unknown ({file.name})" for file in found})
    if not formats:
        raise UserMistake(f"{knob}path={path}: the folder holds no data file ({', '.join(ENDINGS)}).")
    if len(formats) > 1 or formats[0] not in ENDINGS.values():
        raise UserMistake(
            f"{knob}format=auto cannot tell how to read {path}: {', '.join(formats)}. Set {knob}format to one of "
            f"{', '.join(dict.fromkeys(ENDINGS.values()))}, or name the files by a pattern such as {path}/*.jsonl."
        )
    return formats[0], tuple(found)


def _format_of(file: Path) -> str | None:
    return ENDINGS.get((file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower())


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} is missing too."
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


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


def read_ids(file: Path) -> frozenset[str]:
    """Row ids from a file of lines, a JSON list, or the keys of a JSON object."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserMistake(f"exclude_ids={file} cannot be read: {error}") from None
    if content.lstrip()[:1] in ("[", "{"):
        try:
            return frozenset(str(entry) for entry in json.loads(content))
        except json.JSONDecodeError as error:
            raise UserMistake(f"exclude_ids={file} is broken JSON at line {error.lineno}: {error.msg}.") from None
    return frozenset(line.strip() for line in content.splitlines() if line.strip())


def _saved(spec: SourceSpec) -> Any:
    import datasets

    try:
        table = datasets.load_from_disk(str(Path(spec.path).expanduser()))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserMistake(
            f"{spec.knob}path={spec.path} is no folder written by datasets.save_to_disk: {error}"
        ) from None
    if isinstance(table, datasets.DatasetDict):
        if spec.split not in table:
            raise UserMistake(f"{spec.knob}split={spec.split}: {spec.path} has the splits {', '.join(table)}.")
        table = table[spec.split]
    return table.with_format(None)


def _from_hub(spec: SourceSpec) -> Any:
    import datasets

    try:
        return datasets.load_dataset(spec.path, name=spec.subset, split=spec.split).with_format(None)
    except Exception as error:  # the hub client fails in many ways; each is the user's to mend
        first = str(error).strip().partition("\n")[0]
        raise UserMistake(
            f"{spec.knob}path={spec.path}: the hub did not give the data set ({type(error).__name__}: {first}). "
            "Check the name, the subset, the split and the network, or download it and give the path of the files."
        ) from None


def texts(run: Run) -> Iterator[str]:
    """The plain words of a run's training rows, the sources in turn: what `model=tiny` trains its tokenizer from."""
    turns = deque(map(_plain, sources_of(run.data, run.objective.name)))
    while turns:
        source = turns.popleft()
        if (text := next(source, None)) is not None:
            yield text
            turns.append(source)


def _plain(spec: SourceSpec) -> Iterator[str]:
    for row in read_rows(spec):
        if isinstance(row, Row):
            try:
                yield spec.columns.document(row.value).plain()
            except Unfit:
                continue
