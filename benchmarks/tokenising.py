"""How fast rows become tokens, and in how much memory: `python benchmarks/tokenising.py [--data rows.jsonl] [--toy]`.

Against the tokenizer's own `encode_batch` over all cores on the same texts, already read and rendered, and held in
memory: a bound that knows no files, no templates and no trained spans. In turns, medians of at least 5 repeats:

- *warm*: inside a process that has done it once: what `distft data prepare` does with one source (reading, template,
  tokens, trained spans, Arrow file; its worker processes are started anew every time), against `encode_batch`;
- *cold*: from the start of the process to its end: `distft data prepare`, against a script that reads the rows, renders
  them with the same template by transformers and calls `encode_batch`, keeping nothing;
- *memory*: the most anonymous memory of `distft data prepare` and its workers together, and for ten times the rows.

Bars: warm tokens/s at least 0.8 x, memory at ten times the rows at most 1.2 x; exit code 3 where one is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rows import make
from timing import ROOT, Seconds, arguments_of, interleaved, table, write_record

RATE_BAR, MEMORY_BAR = 0.8, 1.2
CHUNK = 1000  # texts in one call of the bare tokenizer
BARE = """
import json, sys
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template
rows, folder = sys.argv[1:]
template = open(folder + "/chat_template.jinja").read()
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
with open(rows) as lines:
    chats = [json.loads(line)["messages"] for line in lines]
texts, _ = render_jinja_template(chats, chat_template=template)
for start in range(0, len(texts), 1000):
    tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
"""


@dataclass
class Place:
    """Where rows, model and caches of one size lie."""

    folder: Path
    rows: Path

    def command(self, cache: Path) -> list[str]:
        return [
            sys.executable, "-m", "distft", "data", "prepare", "model=hf", f"model.path={self.folder / 'model'}",
            "data=jsonl", f"data.path={self.rows}", f"data.cache_dir={cache}",
        ]  # fmt: skip


def prepare_cold(place: Place) -> None:
    cache = Path(tempfile.mkdtemp(dir=place.folder))
    subprocess.run(place.command(cache), check=True, cwd=ROOT, capture_output=True)
    shutil.rmtree(cache)


def bare_cold(place: Place) -> None:
    subprocess.run([sys.executable, "-c", BARE, str(place.rows), str(place.folder / "model")], check=True)


def peak_memory(place: Place) -> int:
    """The most anonymous bytes of the process and its children together while it prepares."""
    cache = Path(tempfile.mkdtemp(dir=place.folder))
    process = psutil.Popen(place.command(cache), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process))
        time.sleep(0.02)
    assert process.returncode == 0, process.args
    shutil.rmtree(cache)
    return peak


def anonymous(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(OSError, psutil.NoSuchProcess):  # one of them has just ended
        for one in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{one.pid}/status").read_text()
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    return total


def warm(place: Place, repeats: int) -> tuple[dict[str, Seconds], int]:
    """Seconds of both, by name, and the number of tokens."""
    from transformers import AutoTokenizer

    from distft.config.schema import Run
    from distft.data.rows import Row
    from distft.data.sources import read_rows, sources_of
    from distft.data.tokenise import tokenise
    from distft.objective import make_encoder

    run = Run()
    run.data.path, run.data.format = str(place.rows), "jsonl"
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    encoder: Any = make_encoder(run, tokenizer, place.folder / "model")
    spec = sources_of(run.data, "sft")[0]
    texts = [
        encoder.template.trained_spans(spec.columns.document(row.value), "auto")[0].text
        for row in read_rows(spec)
        if isinstance(row, Row)
    ]
    out = Path(tempfile.mkdtemp(dir=place.folder))
    tokens = {"distft": 0, "encode_batch": 0}

    def ours() -> None:
        tokens["distft"] = tokenise(spec, encoder, out, "auto")["tokens"]

    def bare() -> None:
        backend = encoder.tokenizer.backend
        tokens["encode_batch"] = sum(
            len(encoding.ids)
            for start in range(0, len(texts), CHUNK)
            for encoding in backend.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)
        )

    seconds = interleaved({"distft": ours, "encode_batch": bare}, repeats)
    assert tokens["distft"] == tokens["encode_batch"], tokens
    return seconds, tokens["distft"]


def given_rows(file: Path, folder: Path) -> None:
    """Rows of a file, questions and answers or messages, as messages; the model is made for made-up rows."""
    with file.open(encoding="utf-8") as lines, (folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        for row in map(json.loads, lines):
            said = row.get("messages") or [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            out.write(json.dumps({"messages": said}) + "\n")


def repeated(rows: Path, times: int) -> Path:
    file = rows.with_name(f"rows-{times}.jsonl")
    with file.open("wb") as out:
        for _ in range(times):
            out.write(rows.read_bytes())
    return file


def main() -> int:
    parser: argparse.ArgumentParser = arguments_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000, help="made-up rows")
    parser.add_argument("--data", type=Path, help="a JSON-lines file to take instead: messages, or question and answer")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    given = parser.parse_args()
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    repeats = 1 if given.toy else max(5, given.repeats)
    with tempfile.TemporaryDirectory(prefix="distft-tokenising-") as name:
        folder = Path(name)
        make(folder, "toy", 400 if given.toy else given.vocabulary, 0.57, 200 if given.toy else given.rows)
        if given.data:
            given_rows(given.data, folder)
        place, tenfold = Place(folder, folder / "rows.jsonl"), Place(folder, repeated(folder / "rows.jsonl", 10))
        once, most = peak_memory(place), peak_memory(tenfold)
        cold = interleaved(
            {"distft": lambda: prepare_cold(place), "encode_batch": lambda: bare_cold(place)}, repeats, warm_up=0
        )
        seconds, tokens = warm(place, repeats)
        rows = [
            {
                "way": way,
                **{f"{name} s": round(found[name].wall, 3) for name in found},
                **{f"{name} tokens/s": round(tokens / found[name].wall) for name in found},
                "ratio": round(found["encode_batch"].wall / found["distft"].wall, 3),
            }
            for way, found in (("warm", seconds), ("cold", cold))
        ]
        print(table(rows))
        print(f"{tokens:,} tokens, {len(os.sched_getaffinity(0))} cores; the bar for the ratio (warm) is {RATE_BAR}")
        growth = most / once
        print(f"peak memory {once / 2**20:.0f} MiB, of ten times the rows {most / 2**20:.0f} MiB: {growth:.2f} x, "
              f"the bar is {MEMORY_BAR}")  # fmt: skip
        write_record(given.out, tokens=tokens, rows=rows, peak_bytes={"once": once, "tenfold": most})
    missed = rows[0]["ratio"] < RATE_BAR or growth > MEMORY_BAR
    return 3 if missed and not given.toy else 0


if __name__ == "__main__":
    sys.exit(main())
