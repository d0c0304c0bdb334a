"""Rows are read as they are from every format, bad ones are told apart, columns become documents."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.config.schema import Data, Run, Source
from distft.data import formats
from distft.data.files import read_ids
from distft.data.rows import BadRow, Columns, Document, Row, Unfit
from distft.data.sources import SourceSpec, read_rows, sources_of, texts
from distft.errors import UserMistake
from tests.unit.some_data import write_jsonl

ROWS = [
    {"id": "a", "question": "One, two?", "answer": 'Three "quoted"\nand a line'},
    {"id": "b", "question": "Größe? 日本", "answer": "ja 😀"},
    {"id": "c", "question": "  spaces  ", "answer": "tab\there"},
]


def spec_of(path: object, objective: str = "sft", **knobs: Any) -> SourceSpec:
    return sources_of(Data(path=str(path), **knobs), objective)[0]


def rows_of(path: object, **knobs: Any) -> list[Row | BadRow]:
    return list(read_rows(spec_of(path, **knobs)))


def write(folder: Path, format: str) -> Path:
    """ROWS in one of the formats."""
    file = folder / f"rows.{format}"
    if format == "jsonl":
        write_jsonl(file, ROWS)
    elif format == "jsonl.gz":
        file.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS)))
    elif format == "json":
        file.write_text(json.dumps(ROWS, ensure_ascii=False, indent=2), encoding="utf-8")
    elif format in ("csv", "tsv"):
        import csv

        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="," if format == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif format == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file


@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, format: str) -> None:
    rows = rows_of(write(tmp_path, format))
    assert [row.value for row in rows if isinstance(row, Row)] == ROWS
    assert [row.id for row in rows] == ["a", "b", "c"]


def test_an_object_of_records_is_keyed_by_id(tmp_path: Path) -> None:
    file = tmp_path / "keyed.json"
    file.write_text(json.dumps({key: {"question": "q", "answer": key} for key in ("x", "7")}))
    assert [(row.id, row.number) for row in rows_of(file)] == [("x", 1), ("7", 2)]


def test_a_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "other": table.select([1])}).save_to_disk(tmp_path / "many")
    assert [row.value for row in rows_of(tmp_path / "one") if isinstance(row, Row)] == ROWS
    assert [row.id for row in rows_of(tmp_path / "many", split="other")] == ["b"]
    with pytest.raises(UserMistake, match=r"data.split=tset: .* has the splits train, other"):
        spec_of(tmp_path / "many", split="tset")


def test_a_hub_id_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserMistake, match=r"data\.path=nobody/nothing: the hub did not give the data set"):
        spec_of("nobody/nothing", format="hub")


def test_bad_lines_are_told_apart_and_the_good_ones_kept(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "a"}
    file = write_jsonl(
        tmp_path / "rows.jsonl",
        [good, b'{"question": "cut', b'{"question": "\xff", "answer": "a"}', [1], {}, b"  ", good, b"[" * 100_000],
    )
    rows = rows_of(file)
    assert [(row.number, row.reason if isinstance(row, BadRow) else "") for row in rows] == [
        (1, ""),
        (2, "broken JSON"),
        (3, "invalid UTF-8"),
        (4, "wrong type"),
        (5, "empty"),
        (7, ""),
        (8, "broken JSON"),
    ]


def test_line_numbers_go_on_from_block_to_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q" * n, "answer": "a"} for n in range(1, 40)])
    whole = rows_of(file)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 50)
    assert len(list(spec_of(file).blocks())) > 5
    assert rows_of(file) == whole
    assert [row.number for row in whole] == list(range(1, 40))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_json_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    values = [
        {"a": n, "b": ["é😀\\n", {"deep": [1.5e10, None, True, "x" * n]}], "question": "q", "answer": "a"}
        for n in range(9)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    monkeypatch.setattr(formats, "READ_CHARS", size)
    assert [row.value for row in rows_of(file) if isinstance(row, Row)] == values


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"question": "q", "answer": "a"},\n {"question": "q" "answer"}]')
    with pytest.raises(UserMistake, match="is broken JSON at line 2"):
        rows_of(file)
    file.write_text('[{"question": "q", "answer": "a"},\n')
    with pytest.raises(UserMistake, match="is broken JSON at line 2"):
        rows_of(file)
    file.write_text('[{"question": "q", "answer": "a"}, 5]')
    assert [type(row) for row in rows_of(file)] == [Row, BadRow]


def test_csv_rows_of_the_wrong_width(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'question,answer\nq,a\none\nq,"a\nb"\nq,\xff\n')
    rows = rows_of(file)
    assert [(row.number, type(row).__name__) for row in rows] == [(2, "Row"), (3, "BadRow"), (4, "Row"), (6, "Row")]
    with pytest.raises(Unfit, match="invalid UTF-8"):
        Columns().document(rows[3].value)  # type: ignore[union-attr]


def test_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {n}. " + "word " * (n % 40) for n in range(100)) + "\n" + "endless " * 3000
    file = tmp_path / "book.txt"
    file.write_text(text, encoding="utf-8")
    spec = spec_of(file, objective="lm", sequence_length=64)
    found = [row.value["text"] for row in read_rows(spec) if isinstance(row, Row)]
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(len(part) >= 250 for part in found[:-1])
    assert all(part.startswith("Paragraph") for part in found)


def test_several_files_by_folder_and_pattern(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": "q", "answer": name}])
    by_folder, by_pattern = rows_of(tmp_path), rows_of(tmp_path / "*.jsonl")
    assert [row.id for row in by_folder] == ["a.jsonl:1", "b.jsonl:1"]
    assert by_folder == by_pattern
    (tmp_path / "c.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(UserMistake, match=r"data\.format=auto cannot tell how to read .*: csv, jsonl"):
        spec_of(tmp_path)
    assert len(rows_of(tmp_path, format="jsonl")) == 2


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(UserMistake, match=r"Did you mean .*train\.jsonl\?"):
        spec_of(tmp_path / "trian.jsonl")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            ["user:q", "assistant:a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ["user:q", "assistant:a"],
        ),
        ({"prompt": "q", "completion": "a"}, ["user:q", "assistant:a"]),
        ({"instruction": "do", "input": "this", "output": "a"}, ["user:do\n\nthis", "assistant:a"]),
        ({"instruction": "do", "input": "", "output": "a"}, ["user:do", "assistant:a"]),
        ({"system": "s", "question": "q", "answer": 4}, ["system:s", "user:q", "assistant:4"]),
    ],
)
def test_columns_are_recognised(value: dict[str, Any], expected: list[str]) -> None:
    document = Columns().document(value)
    assert [f"{message['role']}:{message['content']}" for message in document.messages] == expected
    assert document.trained == tuple(part.startswith("assistant") for part in expected)


def test_text_and_unknown_columns() -> None:
    assert Columns().document({"text": "words"}) == Document(text="words")
    with pytest.raises(Unfit, match="unknown columns"):
        Columns().document({"query": "q", "reply": "a"})


def test_turns_without_weight_are_not_trained() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}] * 2
    assert Columns().document({"messages": turns}).trained == (False,) * 4
    prompt, completion = turns[:3], [{"role": "assistant", "content": "b"}]
    document = Columns().document({"prompt": prompt, "completion": completion})
    assert document.trained == (False, False, False, True)
    assert all("weight" not in message for message in document.messages)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"question": "q", "answer": "  "}, "empty"),
        ({"question": ["q"], "answer": "a"}, "wrong type"),
        ({"question": "q", "answer": "\ud800"}, "invalid UTF-8"),
        ({"messages": "no list"}, "wrong type"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "wizard", "content": "q"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong type"),
        ({"messages": [{"role": "assistant", "content": None}]}, "wrong type"),
    ],
)
def test_what_cannot_be_a_document(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unfit) as fault:
        Columns().document(value)
    assert fault.value.reason == reason


def test_templates_join_lists_and_refuse_what_is_no_text() -> None:
    columns = Columns((("assistant", "{{ A }}"), ("user", "{{ C | join(' + ') }}: {{ Q }}")))
    document = columns.document({"Q": "why", "C": ["x", "y"], "A": "because"})
    assert [message["content"] for message in document.messages] == ["x + y: why", "because"]
    with pytest.raises(Unfit, match="a column is null"):
        columns.document({"Q": "why", "C": ["x"], "A": None})
    with pytest.raises(Unfit, match=r"join it in the template"):
        Columns((("text", "{{ C }}"),)).document({"C": ["x"]})


def test_templates_cannot_reach_python() -> None:
    with pytest.raises(Unfit, match="a template failed"):
        Columns((("text", "{{ ''.__class__.__mro__ }}"),)).document({"C": "x"})


def test_a_misspelt_column_is_told_with_the_nearest_before_all_is_read(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"Question": "q", "LONG_ANSWER": "a"}] * 300)
    columns = {"user": "{{ Question }}", "assistant": "{{ LONG_ANSWR }}"}
    with pytest.raises(UserMistake, match=r"no column 'LONG_ANSWR'; did you mean 'LONG_ANSWER'\?"):
        spec_of(file, columns=columns)
    assert len(rows_of(file, columns={**columns, "assistant": "{{ LONG_ANSWER }}"})) == 300
    with pytest.raises(UserMistake, match=r"unknown columns .*The rows have the columns LONG_ANSWER, Question"):
        spec_of(file)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"asistant": "{{ a }}"}, "Did you mean assistant?"),
        ({"user": "{{ q }}"}, "give either text, or messages, or assistant"),
        ({"assistant": "{{ a }}", "text": "{{ t }}"}, "give either text"),
        ({"assistant": "{{ a "}, "a template cannot be read"),
        ({"assistant": "a", "user": "{{ q }}"}, "names a column"),
    ],
)
def test_columns_that_mean_nothing(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"q": "q", "a": "a"}])
    with pytest.raises(UserMistake) as mistake:
        spec_of(file, columns=columns)
    assert message in str(mistake.value)


def test_plain_text_is_refused_for_sft(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "words"}])
    with pytest.raises(UserMistake, match="Add objective=lm"):
        spec_of(file)
    assert len(list(read_rows(spec_of(file, objective="lm")))) == 1


@pytest.mark.parametrize("content", ['["a", "7"]', '{"a": "yes", "7": "no"}', "a\n7\n", "\ufeffa\r\n7"])
def test_ids_to_leave_out(tmp_path: Path, content: str) -> None:
    ids = tmp_path / "ids"
    ids.write_text(content, encoding="utf-8")
    assert read_ids(ids) == {"a", "7"}
    rows = [{"key": key, "question": "q", "answer": "a"} for key in ("a", "b", 7)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row.id for row in rows_of(file, exclude_ids=str(ids), columns={"id": "key"})] == ["b"]


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = Data(sources=[Source(path=file), Source(path=file)])
    with pytest.raises(UserMistake, match="two sources are called rows"):
        sources_of(data, "sft")
    data.sources[1].name = "again"
    assert [spec.name for spec in sources_of(data, "sft")] == ["rows", "again"]


def test_python_docs_are_the_same_every_time_and_import_nothing_odd() -> None:
    program = (
        "import hashlib, json, sys\nfrom distft.data.python_docs import collect\nrows = list(collect())\n"
        "print(len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest(), len({row['id'] for row in rows}),"
        " sorted({'antigravity', 'this', 'idlelib', 'test', 'tkinter', 'turtle', 'asyncio'} & set(sys.modules)))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
    count, _, different, modules = answers.pop().split(maxsplit=3)
    assert int(count) > 2000
    assert count == different
    assert modules.strip() == "[]"


def test_texts_for_the_tokenizer(tmp_path: Path) -> None:
    run = Run()
    run.data.path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, b"broken"])
    assert list(texts(run)) == [f"{row['question']}\n{row['answer']}" for row in ROWS]


def test_texts_take_the_sources_in_turn(tmp_path: Path) -> None:
    run = Run()
    for name, count in (("x", 3), ("y", 1)):
        rows = [{"question": name, "answer": str(index)} for index in range(count)]
        run.data.sources.append(Source(path=write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    assert list(texts(run)) == ["x\n0", "y\n0", "x\n1", "x\n2"]


def test_content_hash_knows_content_alone() -> None:
    one = Columns().document({"question": "q", "answer": "a", "id": 1})
    assert one.content_hash() == Columns().document({"answer": "a", "question": "q", "id": 2}).content_hash()
    assert one.content_hash() != Columns().document({"question": "q", "answer": "b"}).content_hash()
