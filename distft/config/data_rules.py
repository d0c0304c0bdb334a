"""The rules over `data` and its sources, and over the files that a run names."""

from __future__ import annotations

import difflib
import glob
import math
import re
from collections.abc import Iterator
from pathlib import Path

from distft.config.given import all_knobs, is_default
from distft.config.schema import Run

FILE_FORMATS = ("jsonl", "json", "csv", "parquet", "text", "saved")
ENDINGS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def data(run: Run) -> Iterator[str]:
    given = run.data
    if given.path and given.sources:
        yield "data.path and data.sources exclude each other. Put the path into data.sources, or drop data.sources."
    if given.format == "python_docs":
        word = ENDINGS.get(Path(given.path or "").suffix, "jsonl")
        for name in ("path", "columns", "exclude_ids", "eval_path"):
            if not is_default(run, f"data.{name}"):
                yield f"data.{name} has no effect with data=python_docs (the default). Add data={word} to read rows."
    elif not given.path and not given.sources:
        yield f"data={given.name} needs rows: set data.path to a file, folder or hub id, or data.sources to several."
    yield from split_knobs("data.", given.format, given.subset, given.split)
    if given.eval_path and given.eval_fraction not in (0, all_knobs()["data.eval_fraction"].default):
        yield (
            f"data.eval_fraction={given.eval_fraction} has no effect with data.eval_path: nothing is held out of the "
            "training rows. Drop one of the two."
        )
    if not given.eval_path and not is_default(run, "data.eval_split"):
        yield f"data.eval_split={given.eval_split} has no effect without data.eval_path. Set it, or drop this."
    if given.workers != "auto" and not (isinstance(given.workers, int) and given.workers >= 1):
        yield f"data.workers={given.workers}: auto or a number of processes from 1 is wanted."


def split_knobs(prefix: str, format: str, subset: str | None, split: str) -> Iterator[str]:
    if subset is not None and format not in ("auto", "hub"):
        yield f"{prefix}subset={subset} has no effect with format={format}: only hub data sets have subsets. Drop it."
    if split != "train" and format not in ("auto", "hub", "saved"):
        yield f"{prefix}split={split} has no effect with format={format}: files have no splits. Give the file's path."


def sources(run: Run) -> Iterator[str]:
    listed = run.data.sources
    weights = [source.weight for source in listed]
    if any(weight is not None for weight in weights) and any(weight is None for weight in weights):
        without = [str(index) for index, weight in enumerate(weights) if weight is None]
        yield f"data.sources: give weight for all sources or for none; none at index {', '.join(without)}."
    names = [source.name or Path(source.path or source.format).stem for source in listed]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.sources: two sources are called {name} in metrics. Give each a name: {{path: …, name: …}}."
    for index, source in enumerate(listed):
        prefix = f"data.sources[{index}]."
        if source.weight is not None and not (source.weight > 0 and math.isfinite(source.weight)):
            yield f"{prefix}weight={source.weight}: a positive number is wanted. Take the source out to leave it out."
        if source.format != "python_docs" and not source.path:
            yield f"{prefix}path is missing: a file, a folder or a hub id."
        yield from split_knobs(prefix, source.format, source.subset, source.split)


def looks_local(path: str) -> bool:
    """Whether a path means this machine's disk: not just a hub's `owner/name`."""
    return path.startswith((".", "/", "~")) or Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def files(run: Run) -> Iterator[str]:
    """Files that are named but not there."""
    named: list[tuple[str, str | None, str]] = []
    if run.data.format != "python_docs":
        named += [(f"data.{name}", getattr(run.data, name), run.data.format) for name in ("path", "eval_path")]
        named.append(("data.exclude_ids", run.data.exclude_ids, "file"))
    for index, source in enumerate(run.data.sources):
        named.append((f"data.sources[{index}].path", source.path, source.format))
        named.append((f"data.sources[{index}].exclude_ids", source.exclude_ids, "file"))
    if run.data.chat_template not in ("auto", "chatml"):
        named.append(("data.chat_template", run.data.chat_template, "file"))
    for name, path, format in named:
        must_exist = format in (*FILE_FORMATS, "file") or (format == "auto" and path and looks_local(path))
        if path and must_exist and not Path(path).expanduser().exists() and not glob.glob(str(Path(path).expanduser())):
            yield f"{name}={path}: there is no such file or folder." + beside(Path(path).expanduser())


def beside(path: Path) -> str:
    """The nearest name in the folder where a file was looked for."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} is missing too."
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.75)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
