"""Rows that cannot be used are counted by reason with their lines, and leave no trace in what is trained."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distft import errors
from distft.data.batches import Plan
from distft.data.cache import PreparedData
from distft.data.sources import texts
from distft.errors import UserMistake
from tests.faults.runs import ROOT, Shop, final_weights, records
from tests.unit.some_data import a_run, byte_level, prepared, questions, write_jsonl

TRIAL = "bad rows: broken JSON, wrong types, empty, invalid UTF-8, a 10 MB row, a row with no assistant turn"
LARGE = 10_000_000


def messages(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


def bad_rows() -> list[tuple[str, Any]]:
    """(reason, row) of everything that must not be trained on."""
    user = {"role": "user", "content": "What?"}
    call = {"type": "function", "function": {"name": "\udc80", "arguments": {}}}
    return [
        ("broken JSON", b'{"question": "cut off'),
        ("broken JSON", b'{"question": "q", "answer": "a"} {"two": "in a line"}'),
        ("broken JSON", b"[" * 100_000),
        ("broken JSON", b"not JSON at all"),
        ("wrong type", [1, 2]),
        ("wrong type", "a text"),
        ("wrong type", None),
        ("wrong type", {"question": ["q"], "answer": "a"}),
        ("wrong type", {"question": "q", "answer": {"text": "a"}}),
        ("wrong type", {"id": ["no", "id"], "question": "q", "answer": "a"}),
        ("wrong type", {"messages": 7}),
        ("wrong type", messages({"role": "user", "content": 3.5}, {"role": "assistant", "content": [7]})),
        ("wrong type", {"messages": ["What?", "That."]}),
        ("unknown role", messages(user, {"role": 5, "content": "That."})),
        ("unknown columns", {"something": "else"}),
        ("unknown columns", {"question": None, "answer": "a"}),
        ("empty", {}),
        ("empty", {"question": "q", "answer": ""}),
        ("empty", {"question": " \n", "answer": "a"}),
        ("empty", {"messages": []}),
        ("empty", messages(user, {"role": "assistant", "content": " "})),
        ("invalid UTF-8", b'{"question": "q", "answer": "\xff\xfe"}'),
        ("invalid UTF-8", {"question": "half a pair \ud83d", "answer": "a"}),
        ("invalid UTF-8", {"id": "\udcff", "question": "q", "answer": "a"}),
        ("longer than data.max_row_bytes", {"question": "q", "answer": "x" * LARGE}),
        ("longer than data.max_row_bytes", b"y" * LARGE),
        ("no assistant turn", messages(user)),
        ("no assistant turn", messages({"role": "system", "content": "Be good."}, user)),
        ("no assistant turn", messages(user, {"role": "assistant", "content": "That.", "weight": 0})),
        ("the chat template refuses the row", messages(user, {"role": "assistant", "tool_calls": [call]})),
    ]  # fmt: skip


def mixed(good: list[Any]) -> tuple[list[Any], list[tuple[int, str]]]:
    """Good rows with a bad one behind every fourth, and (line, reason) of each bad one."""
    rows, listed, waiting = [], [], bad_rows()
    for number, row in enumerate(good):
        rows.append(row)
        if number % 4 == 3 and waiting:
            reason, bad = waiting.pop(0)
            rows.append(bad)
            listed.append((len(rows), reason))
    assert not waiting
    return rows, listed


def listed_in(file: Path) -> list[tuple[int, str]]:
    return [(record["number"], record["reason"]) for record in map(json.loads, file.read_text().splitlines())]


def lines_by_reason(listed: list[tuple[int, str]]) -> dict[str, list[str]]:
    return {reason: [str(line) for line, other in listed if other == reason] for _, reason in listed}


# --- counted, listed, told --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clean.jsonl`, `mixed.jsonl` with `listed.json` beside it."""
    folder = tmp_path_factory.mktemp("bad-rows")
    good = [{"id": f"q{number}", **row} for number, row in enumerate(questions(160))]
    rows, listed = mixed(good)
    write_jsonl(folder / "clean.jsonl", good)
    write_jsonl(folder / "mixed.jsonl", rows)
    (folder / "listed.json").write_text(json.dumps(listed))
    return folder


def data_of(folder: Path, name: str, **knobs: Any) -> PreparedData:
    run = a_run(folder, path=str(folder / f"{name}.jsonl"), format="jsonl", **knobs)
    out = folder / name
    out.mkdir(exist_ok=True)
    # A template that calls a column of the tool's, which no row but the bad one makes it do.
    tokenizer = byte_level()
    tokenizer.chat_template = "{%- for m in messages if m.tool_calls %}{{ m.tool_calls.no.such }}{% endfor -%}" + str(
        tokenizer.chat_template
    )
    return prepared(run, tokenizer, out)


@pytest.mark.trial(TRIAL)
def test_every_bad_row_is_listed_by_line_and_the_rest_is_the_clean_subset(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listed = [(line, reason) for line, reason in json.loads((folder / "listed.json").read_text())]
    clean = data_of(folder, "clean")
    assert not (folder / "clean" / "rejected.jsonl").exists()
    found = data_of(folder, "mixed", max_rejected=0.5)
    assert listed_in(folder / "mixed" / "rejected.jsonl") == listed
    expected = lines_by_reason(listed)
    assert found.reports[0]["rejected"] == {reason: len(lines) for reason, lines in expected.items()}
    said = capfd.readouterr().err
    for reason, lines in expected.items():
        assert f"{len(lines)} {reason} (line {', '.join(lines[:5])}" in said

    assert len(found.train) == len(clean.train) == 1
    run = a_run(folder)
    plans = [Plan(data.train, run.batch, 128, 3, True, 0, 1) for data in (clean, found)]
    steps = plans[0].num_steps(2.0, None)
    assert steps == plans[1].num_steps(2.0, None) > 4
    for index in range(steps):
        one, other = (plan.step(index) for plan in plans)
        ids = [[name.partition(":")[2] for name in plan.sample_ids(index)] for plan in plans]
        assert ids[0] == ids[1]
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert a.input_ids.equal(b.input_ids)
            assert a.targets.equal(b.targets)
            assert a.positions.equal(b.positions)


@pytest.mark.trial(TRIAL)
def test_what_is_read_of_a_long_line_stays_bounded(tmp_path: Path) -> None:
    """A line of 100 MB is passed by in pieces."""
    from distft.data.formats import read_jsonl

    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"a": 1}\n')
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b'\n{"a": 2}\n' + b"z" * 3000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = list(read_jsonl(file, longest=2000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    rows = [row for block in blocks for row in block.parsed()]
    assert [(row.number, type(row).__name__) for row in rows] == [(1, "Row"), (2, "BadRow"), (3, "Row"), (4, "BadRow")]
    assert rows[1].detail == "100,000,001 bytes"  # type: ignore[union-attr]
    assert sum(block.size for block in blocks) == file.stat().st_size
    assert sum(1 for block in read_jsonl(file, longest=10**9) for _ in block.parsed()) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 90_000, "the line as a whole must show"


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("format", ["json", "csv", "parquet"])
def test_a_row_too_large_is_told_in_every_format(tmp_path: Path, format: str) -> None:
    from tests.unit.test_sources import rows_of

    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "x" * 5000}, {"question": "r", "answer": "b"}]
    file = tmp_path / f"rows.{format}"
    if format == "json":
        file.write_text(json.dumps(rows))
    elif format == "csv":
        file.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    kinds = [type(row).__name__ for row in rows_of(file, max_row_bytes=1000)]
    assert kinds == ["Row", "BadRow", "Row"]
    assert [type(row).__name__ for row in rows_of(file, max_row_bytes=6000)] == ["Row"] * 3


@pytest.mark.trial(TRIAL)
def test_a_tiny_models_tokenizer_learns_from_rows_that_are_trained(folder: Path) -> None:
    runs = [a_run(folder, path=str(folder / f"{name}.jsonl"), format="jsonl") for name in ("clean", "mixed")]
    clean, found = (list(texts(run)) for run in runs)
    extra = [text for text in found if text not in clean]
    assert extra == ["What?\n"]  # the one that only a template refuses


# --- strict -----------------------------------------------------------------------------------------------------------

STRICT = """
import resource, sys, time
sys.argv = ["train.py", *sys.argv[1:]]
from distft.cli import main
started = time.monotonic()
code = main(["train", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "transformers", "deepspeed", "peft") if name in sys.modules]
print("LOADED", heavy, "CPU", used.ru_utime + used.ru_stime)
sys.exit(code)
"""


def strictly(shop: Shop, name: str, *knobs: str) -> tuple[int, str, float]:
    """Exit code, output and seconds of a strict run."""
    words = shop.words(name, "data.max_rejected=0", *knobs)
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", STRICT, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return ended.returncode, ended.stdout + ended.stderr, time.monotonic() - started


@pytest.mark.trial(TRIAL)
def test_strict_fails_in_seconds_with_nothing_heavy_loaded(folder: Path, tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    code, text, seconds = strictly(shop, "strict", f"data.path={folder / 'mixed.jsonl'}")
    assert code == errors.USER_MISTAKE, text
    assert "LOADED [] CPU" in text
    assert float(text.split(" CPU ")[1].split()[0]) < 5.0, text
    assert seconds < 30, "a wait for something"
    assert "data.max_rejected=0 allows none" in text
    assert "Traceback" not in text
    listed = [(line, reason) for line, reason in json.loads((folder / "listed.json").read_text())][:-1]
    assert listed_in(tmp_path / "strict" / "rejected.jsonl") == listed
    for reason, lines in lines_by_reason(listed).items():
        assert f"{len(lines)} {reason} (line {', '.join(lines[:5])}" in text
    assert not (tmp_path / "cache").exists(), "a model was made"


@pytest.mark.trial(TRIAL)
def test_strict_finds_what_only_the_tokens_tell(folder: Path) -> None:
    with pytest.raises(UserMistake, match=r"the chat template refuses the row \(line \d+.*data.max_rejected=0"):
        data_of(folder, "mixed", max_rejected=0)
    assert len(data_of(folder, "clean", max_rejected=0).train) == 1


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.mark.trial(TRIAL)
@pytest.mark.thorough
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_a_run_with_bad_rows_equals_one_on_the_clean_subset(
    folder: Path, tmp_path: Path, strategy: str, tuning: str, request: pytest.FixtureRequest
) -> None:
    rows = (folder / "mixed.jsonl").read_bytes().splitlines(keepends=True)
    kept = [row for row in rows if b"tool_calls" not in row]  # which only the template refuses: a tokenizer learns it
    (tmp_path / "mixed.jsonl").write_bytes(b"".join(kept))
    shop = Shop(tmp_path)
    knobs = (f"strategy={strategy}", f"tuning={tuning}", "launch.ranks=2", "max_steps=12", "data.max_rejected=0.5")
    for name, file in (("clean", folder / "clean.jsonl"), ("mixed", tmp_path / "mixed.jsonl")):
        code, text = shop.run(name, *knobs, f"data.path={file}")
        assert code == errors.DONE, text
    curves = [[(record["step"], record["loss"]) for record in records(tmp_path / name)] for name in ("clean", "mixed")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 12
    assert final_weights(tmp_path / "clean") == final_weights(tmp_path / "mixed")
    assert len((tmp_path / "mixed" / "rejected.jsonl").read_text().splitlines()) == len(bad_rows()) - 1
