"""From a path to what lies there: files of one format, a saved data set, a hub's data set, a list of ids."""

from __future__ import annotations

import difflib
import glob
import json
from pathlib import Path
from typing import Any

from distft.data.formats import ENDINGS
from distft.errors import UserMistake


def is_hub_id(path: str) -> bool:
    """A hub id is `name` or `owner/name` and no file; anything else is a path on this machine."""
    local = Path(path).expanduser()
    return not (
        local.exists()
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or any(mark in path for mark in "*?[")
        or local.suffix in (*ENDINGS, ".gz")
    )


def files_of(path: str, format: str, knob: str) -> tuple[str, tuple[Path, ...]]:
    """The format and the files behind a path: a file, a folder of files, or a pattern."""
    place = Path(path).expanduser()
    if place.is_dir():
        if format == "auto" and any((place / name).exists() for name in ("state.json", "dataset_dict.json")):
            return "saved", ()
        found = sorted(file for file in place.rglob("*") if file.is_file() and format_of(file))
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(place).parts)]
    elif place.exists():
        found = [place]
    else:
        found = sorted(Path(file) for file in glob.glob(str(place), recursive=True))
        if not found:
            raise UserMistake(f"{knob}path={path}: there is no such file or folder.{nearest_file(place)}")
    if format != "auto":
        found = [file for file in found if not place.is_dir() or format_of(file) == format]
        if not found:
            raise UserMistake(f"{knob}path={path}: the folder holds no {format} file.")
        return format, tuple(found)
    formats = sorted({format_of(file) or f"unknown ({file.name})" for file in found})
    if not formats:
        raise UserMistake(f"{knob}path={path}: the folder holds no data file ({', '.join(ENDINGS)}).")
    if len(formats) > 1 or formats[0] not in ENDINGS.values():
        raise UserMistake(
            f"{knob}format=auto cannot tell how to read {path}: {', '.join(formats)}. Set {knob}format to one of "
            f"{', '.join(dict.fromkeys(ENDINGS.values()))}, or name the files by a pattern such as {path}/*.jsonl."
        )
    return formats[0], tuple(found)


def format_of(file: Path) -> str | None:
    return ENDINGS.get((file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower())


def nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} is missing too."
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


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


def load_saved(path: str, split: str, knob: str) -> Any:
    """The `datasets.Dataset` of a folder."""
    import datasets

    try:
        table = datasets.load_from_disk(str(Path(path).expanduser()))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserMistake(f"{knob}path={path} is no folder written by datasets.save_to_disk: {error}") from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserMistake(f"{knob}split={split}: {path} has the splits {', '.join(table)}.")
        table = table[split]
    return table.with_format(None)


def load_from_hub(path: str, subset: str | None, split: str, knob: str) -> Any:
    """The `datasets.Dataset` of a hub id."""
    import datasets

    try:
        return datasets.load_dataset(path, name=subset, split=split).with_format(None)
    except Exception as error:  # the hub client fails in many ways; each is the user's to mend
        first = str(error).strip().partition("\n")[0]
        raise UserMistake(
            f"{knob}path={path}: the hub did not give the data set ({type(error).__name__}: {first}). "
            "Check the name, the subset, the split and the network, or download it and give the path of the files."
        ) from None
