"""What `distft data` shows is what is trained."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distft.data.see import STOP, TRAINED, coloured, marked, report, runs_of, show_rows
from distft.model.decode import stop_ids
from distft.verbs.data import main
from tests.unit.some_data import a_run, byte_level, prepared, questions, write_jsonl


def encoded(tokenizer: Any, *turns: str) -> tuple[Any, Any]:
    import numpy as np

    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    answer = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return np.asarray(answer["input_ids"]), np.asarray(answer["assistant_masks"], dtype=bool)


def test_trained_and_stop_tokens_are_marked() -> None:
    tokenizer = byte_level()
    ids, trained = encoded(tokenizer, "Größe?", "ja 😀", "und?", "nein")
    runs = list(runs_of(ids, trained, tokenizer, [tokenizer.eos_token_id]))
    assert marked(runs) == (
        "<|im_start|>user\nGröße?<|im_end|>■\n<|im_start|>assistant\n⟦ja 😀<|im_end|>■⟧\n"
        "<|im_start|>user\nund?<|im_end|>■\n<|im_start|>assistant\n⟦nein<|im_end|>■⟧\n"
    )
    text = coloured(runs)
    assert text.plain == tokenizer.decode(ids)
    styled = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styled["ja 😀"] == TRAINED
    assert STOP in {span.style for span in text.spans}
    assert "⟦" not in marked(list(runs_of(ids, ~trained & trained, tokenizer, [])))
    assert marked(list(runs_of(ids, trained | True, tokenizer, []))).endswith("\n⟧")


def test_rows_and_report(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows: list[Any] = [*questions(40), b"broken"]
    run = a_run(tmp_path, path=write_jsonl(tmp_path / "rows.jsonl", rows), max_rejected=0.1)
    data = prepared(run, tokenizer, tmp_path)
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    show_rows(console, data, 2, tokenizer, stop_ids(tokenizer, Path(tokenizer.name_or_path)))
    report(console, data, run.data.sequence_length)
    text = stream.getvalue()
    assert text.count("⟦It is ") == 2
    assert text.count("<|im_end|>■⟧") == 2
    assert f"{data.train[0].lengths.sum():,}" in text
    assert "rows: 1 rejected: broken JSON (line 41)" in text


@pytest.mark.parametrize("sub", ["prepare", "show"])
def test_the_verb(tmp_path: Path, capfd: pytest.CaptureFixture[str], sub: str) -> None:
    run = a_run(tmp_path, path=write_jsonl(tmp_path / "rows.jsonl", questions(40)))
    run.model.tiny.hidden_size, run.model.tiny.num_layers, run.model.tiny.vocab_size = 16, 1, 300
    assert main(run, sub, 1) == 0
    first = capfd.readouterr()
    assert ("⟦It is " in first.out) == (sub == "show")
    assert ("Ready in" in first.out) == (sub == "prepare")
    assert "tokenised for the first time" in first.err
    assert main(run, sub, 1) == 0
    assert "found tokenised" in capfd.readouterr().err
