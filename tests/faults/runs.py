"""Real runs to do harm to: started as a person starts them, watched through their files, ended by their own ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.small_run import SMALL, write_rows

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400.0  # seconds that anything here may take on a busy machine


@dataclass
class Started:
    """One run that was started."""

    process: subprocess.Popen[str]
    folder: Path
    output: Path | None = None  # not a pipe: one that nobody reads fills up, and then the run waits

    def end(self, seconds: float = PATIENCE) -> tuple[int, str]:
        """Wait for the end. Returns the exit code and everything it printed."""
        if self.output is None:
            text, _ = self.process.communicate(timeout=seconds)
        else:
            self.process.wait(seconds)
            text = self.output.read_text(encoding="utf-8", errors="replace")
        return self.process.returncode, text

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, by rank, whoever started them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = {}
        for child in children:
            try:
                if any(Path(word).name in ("train", "train.py") for word in child.cmdline()):
                    found[int(child.environ()["RANK"])] = child
            except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
                continue
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Until `what` returns something true; fails with the run's output where the run ends before."""
        deadline = time.monotonic() + seconds
        while not (value := what()):
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, f"{what} never came true"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int) -> None:
        """Until a training record of `step` or a later one is there (start the run with log.every=1)."""
        self.wait_for(lambda: any(record["step"] >= step for record in records(self.folder)))


@dataclass(frozen=True)
class Shop:
    """A folder with rows, a cache that its runs share, and a run folder for each."""

    folder: Path
    launcher: tuple[str, ...] = (sys.executable,)  # what stands before train.py

    @classmethod
    def open(cls, folder: Path, num_rows: int = 60) -> Shop:
        write_rows(folder / "rows.jsonl", num_rows)
        return cls(folder)

    def words(self, name: str, *overrides: str) -> list[str]:
        """The command line of a small run: what is given last is what holds."""
        fixed = [word for word in SMALL if not word.startswith("eval.")]
        return [
            *fixed, "data=jsonl", f"data.path={self.folder / 'rows.jsonl'}", f"data.cache_dir={self.folder / 'cache'}",
            f"run.dir={self.folder / name}", "log.every=1", "eval.samples=0", "eval.at_start=false", *overrides,
        ]  # fmt: skip

    @contextmanager
    def start(self, name: str, *overrides: str, **environment: str) -> Iterator[Started]:
        """`<launcher> train.py …`; whatever is still there when the test leaves is ended."""
        command = [*self.launcher, str(ROOT / "train.py"), *self.words(name, *overrides)]
        with tempfile.TemporaryDirectory(prefix="distft-printed-") as folder:
            output = Path(folder) / "printed.txt"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                )
            try:
                yield Started(process, self.folder / name, output)
            finally:
                if process.poll() is None:
                    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    for member in family:
                        if member.is_running():
                            member.kill()
                    process.wait()

    def run(self, name: str, *overrides: str, **environment: str) -> tuple[int, str]:
        """A run from its start to its end: exit code and output."""
        with self.start(name, *overrides, **environment) as started:
            return started.end()


def records(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are complete."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in whole if record["split"] == split]


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def final_weights(folder: Path) -> dict[str, bytes]:
    """The weight files of final/ byte by byte."""
    return {path.name: path.read_bytes() for path in sorted((folder / "final").glob("*.safetensors"))}
