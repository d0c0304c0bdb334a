"""Imported by every Python process whose PYTHONPATH names this folder: one rank dies by kill -9 inside a save.

`KILL_AT=point,rank,number`: at this point of the process's save of this number (from 1). The points are what the
product itself does to the file system, seen through Python's audit events; the half shard through `open`.
"""

from __future__ import annotations

import builtins
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

POINTS = ("before", "half a shard", "before manifest", "before rename", "before latest", "while an old one goes")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(point: str, event: str, args: tuple[Any, ...]) -> bool:
    """Whether this event is the beginning of what follows `point`."""
    if event == "os.mkdir":
        return point == "before" and re.search(r"step-\d+\.tmp-\w+$", str(args[0])) is not None
    if event == "open":
        return point == "before manifest" and str(args[0]).endswith("manifest.json") and "w" in str(args[1])
    if event == "os.rename":
        name = {"before rename": r"/step-\d+$", "before latest": r"/latest$", "while an old one goes": r"\.tmp-dead$"}
        return point in name and re.search(name[point], str(args[1])) is not None
    return False


class HalfWritten:
    """A file of whose content only the first half of `num_bytes` reaches the disk."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self.file, self.left = file, num_bytes // 2

    def write(self, data: Any) -> None:
        part = memoryview(data).cast("B")[: self.left]
        self.file.write(part)
        self.left -= len(part)
        if not self.left:
            self.file.flush()
            die()

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def arm(point: str, rank: str, number: int) -> None:
    if os.environ.get("RANK") != rank:
        return
    seen = 0
    plain = open

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.mkdir", "open", "os.rename") and at(point, event, args):
            seen += 1
            if seen == number:
                die()

    def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        nonlocal seen
        file = plain(path, mode, *args, **more)
        if mode == "wb" and re.search(r"\.tmp-\w+/rank-\d+\.safetensors$", str(path)):
            seen += 1
            if seen == number:
                before = next(old for old in Path(path).parent.parent.glob("step-??????/rank-*.safetensors"))
                return HalfWritten(file, before.stat().st_size)
        return file

    if point == "half a shard":
        builtins.open = opened
    else:
        sys.addaudithook(watch)


if os.environ.get("KILL_AT"):
    _point, _rank, _number = os.environ["KILL_AT"].split(",")
    arm(_point, _rank, int(_number))
