"""The words of a run that takes a few seconds on a CPU, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path

SMALL = [
    "model=tiny",
    "model.tiny.hidden_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=1",
    "model.tiny.intermediate_size=64",
    "model.tiny.vocab_size=512",
    "data.sequence_length=128",
    "batch.global_size=2",
    "eval.samples=1",
    "eval.max_new_tokens=4",
    "log=none",
]


def write_rows(path: Path, count: int = 60) -> Path:
    """Sums as questions and answers, as JSON lines."""
    rows = [{"id": n, "question": f"What is {n} plus {n % 7}?", "answer": f"It is {n + n % 7}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
