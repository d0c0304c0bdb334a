"""The evaluations of running trials, read from their folders as they are written and told to the search."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.launch import prune
from distft.log import METRICS
from distft.sweep.study import Search

LOOK_SECONDS = 0.25


@dataclass
class Reader:
    """The evaluations of one run, each once."""

    folder: Path
    key: str  # of the value in an evaluation's record
    read: int = 0  # bytes
    last_step: int = 0  # the evaluation before training is everyone's, and says nothing

    def new(self) -> list[tuple[int, float]]:
        """(step, value) of each evaluation since the last call. A file that became shorter is read anew."""
        path = self.folder / METRICS
        try:
            if path.stat().st_size < self.read:  # the run went on from a checkpoint
                self.read = 0
            with path.open("rb") as file:
                file.seek(self.read)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        return [pair for line in whole.splitlines() if (pair := self.evaluation(line))]

    def evaluation(self, line: bytes) -> tuple[int, float] | None:
        try:
            record: dict[str, Any] = json.loads(line)
            step, value = int(record["step"]), float(record[self.key])
        except (ValueError, TypeError, KeyError):
            return None
        if record.get("split") != "eval" or step <= self.last_step:
            return None
        self.last_step = step
        return step, value


class Watch:
    """Looks at all running trials four times a second, in a thread, and asks those to end that the pruner gives up.

    The runs know nothing of Optuna, and may be on other machines: their folders are what both sides see.
    """

    def __init__(self, search: Search, key: str) -> None:
        self.search, self.key = search, key
        self.readers: dict[int, Reader] = {}
        self.guard = threading.Lock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, name="watch of the trials", daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def follow(self, number: int, folder: Path) -> None:
        with self.guard:
            self.readers[number] = Reader(folder, self.key)

    def leave(self, number: int) -> None:
        """The trial's run has ended: take in its last evaluations."""
        with self.guard:
            reader = self.readers.pop(number)
            for step, value in reader.new():
                self.search.report(number, step, value)

    def run(self) -> None:
        try:
            while not self.ended.wait(LOOK_SECONDS):
                self.look()
        except Exception as error:  # the sweep goes on, only without pruning
            sys.stderr.write(f"distft: trials are no longer watched for pruning: {type(error).__name__}: {error}\n")

    def look(self) -> None:
        with self.guard:
            for number, reader in self.readers.items():
                for step, value in reader.new():
                    if self.search.report(number, step, value):
                        why = f"sweep.pruner={self.search.sweep.pruner}: eval/{self.key} {value:.6g} at step {step}"
                        prune.request(reader.folder, f"{why} is not among the better trials")
