"""JSON lines that survive being killed: one record a line, flushed, cut back to the checkpoint on resume."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_WAITING = 1 << 26  # bytes


def encode(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: they become the strings "NaN", "Infinity" and "-Infinity".

    These are the words of protobuf's JSON mapping; `float()` in Python and `Number()` in JavaScript read them back.
    Finite floats keep every bit (the shortest form that reads back equal).
    """
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


class Lines:
    """An append-only file of records that each hold a `step`.

    `resumed_step`: records past it move to `<name>.abandoned.jsonl` first; None: the run starts anew and all of them
    do. The file appears with its first record.
    """

    def __init__(self, path: Path, resumed_step: int | None = None, say: Callable[[str], None] = print) -> None:
        self.path, self.abandoned, self.say = path, path.with_suffix(".abandoned.jsonl"), say
        self.file: IO[bytes] | None = None
        self.waiting = b""  # for room on the disk
        self.told = False
        if path.exists():
            self.cut(-1 if resumed_step is None else resumed_step)
        self.num_before = sum(num_lines(old) for old in (path, self.abandoned) if old.exists())  # ever written

    def go_back(self, last_step: int) -> None:
        """Abandon what was written past `last_step`, and go on behind it."""
        self.close()
        if self.path.exists():
            self.cut(last_step)

    def cut(self, last_step: int) -> None:
        """Keep records up to `last_step`; what was torn by a kill is abandoned too."""
        kept: list[str] = []
        abandoned: list[str] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= last_step
            except (ValueError, KeyError, TypeError):
                keep = False
            (kept if keep else abandoned).append(line)
        if not abandoned:
            return
        with self.abandoned.open("a", encoding="utf-8") as file:
            file.writelines(line if line.endswith("\n") else line + "\n" for line in abandoned)
        shorter = self.path.with_suffix(".jsonl.tmp")
        with shorter.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        shorter.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. On a disk without room it waits in memory for the next one, and `say` tells so once."""
        if self.file is None:
            self.file = self.path.open("ab", buffering=0)
        line = json.dumps(encode(record), allow_nan=False, ensure_ascii=False) + "\n"
        self.waiting += line.encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if error.errno not in FULL or len(self.waiting) > MOST_WAITING:
                raise
            if not self.told:
                self.say(f"{self.path} cannot be written ({error.strerror}): its lines wait for room")
        self.told = bool(self.waiting)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
