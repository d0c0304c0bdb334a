"""Data preparation: the tokens of every source, found or made; the cache says which, and why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.cache import cache_folder
from distft.config.schema import Run
from distft.data import encoder as encoder_module
from distft.data import formats, rows, template
from distft.data import tokenise as tokenise_module
from distft.data.cache import (
    KEY,
    MANIFEST,
    REJECTED,
    TOKENS,
    EncodedSource,
    PreparedData,
    digest,
    digest_of_files,
    fault_of,
    new_folder,
    open_prepared,
    read_key,
    reason_for_miss,
)
from distft.data.encoder import TOO_LONG, Encoder, MakeEncoder
from distft.data.progress import say
from distft.data.sources import SourceSpec, eval_source_of, sources_of
from distft.data.template import settle_template
from distft.data.tokenise import tokenise
from distft.errors import UserMistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["EncodedSource", "PreparedData", "open_prepared", "prepare", "settle_template"]


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
    sources: list[dict[str, Any]] = []
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
    modules = [rows, formats, template, encoder_module, tokenise_module, inspect.getmodule(type(encoder))]
    code = [(str(module.__name__), Path(str(module.__file__))) for module in modules if module is not None]
    libraries = {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")}
    return {
        "data": contents,
        "data.format": [spec.format, spec.document_chars if spec.format == "text" else 0],
        "data.columns": digest(spec.columns.templates),
        "data.exclude_ids": digest(sorted(spec.excluded)),
        "data.max_row_bytes": spec.max_row_bytes,
        "tokenizer": digest_of_files([("tokenizer.json", Path(encoder.tokenizer.file))]),
        "objective": type(encoder).__name__,
        **{name: digest(dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v) for name, v in settings.items()},  # type: ignore[arg-type]
        "distft's code": digest_of_files(code),
        "libraries": digest(libraries),
    }


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
            f"{count:,} rows of {spec.name} are {TOO_LONG}, the first of them {spec.counted} {first['places'][0]} with "
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
    told = f"{rejected:,} of {total:,} rows of {spec.name} cannot be used: {reasons(report)}."
    if rejected > max_rejected * total:
        raise UserMistake(
            f"{told} That is more than data.max_rejected={max_rejected} allows. They are listed in {file}: mend them, "
            "or raise data.max_rejected."
        )
    say(f"{told} They are left out and listed in {file}")


def reasons(report: dict[str, Any]) -> str:
    """How many rows were rejected why, with the lines of the first ones."""
    told = []
    for reason, count in sorted(report["rejected"].items(), key=lambda item: -item[1]):
        places, detail = report["first"][reason]["places"], report["first"][reason]["detail"]
        where = ", ".join(places) + (", …" if count > len(places) else "")
        told.append(f"{count:,} {reason} ({report['counted']} {where}{f'; the first: {detail}' if detail else ''})")
    return "; ".join(told)
