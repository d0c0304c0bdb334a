"""Interleaved medians, the record and the table: what every benchmark here shares. Imports nothing heavy.

A benchmark whose processes are started anew imports this alone at its top, since they import it again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Seconds:
    """Of one call: on the clock, and spent by this process's threads, which other work on the machine disturbs less."""

    wall: float
    busy: float


def clocked(call: Callable[[], Any]) -> Seconds:
    wall, busy = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - busy)


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, Seconds]:
    """Median seconds of each call; every round takes all of them in turn, so that slow moments hit all alike."""
    taken: dict[str, list[Seconds]] = {name: [] for name in calls}
    for number in range(warm_up + repeats):
        for name, call in calls.items():
            seconds = clocked(call)
            if number >= warm_up:
                taken[name].append(seconds)
    return {
        name: Seconds(statistics.median(one.wall for one in several), statistics.median(one.busy for one in several))
        for name, several in taken.items()
    }


def write_record(path: Path | None, **results: Any) -> None:
    """Results with what made them: date, hardware, versions, command."""
    if path is None:
        return
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    if "torch" in sys.modules:
        import torch

        hardware += f", {torch.get_num_threads()} threads"
        if torch.cuda.is_available():
            hardware += f", {torch.cuda.get_device_name()}"
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware,
        "versions": {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := of(name))},
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


PACKAGES = ("torch", "transformers", "peft", "deepspeed", "liger-kernel", "flash-attn", "triton")


def of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """Columns by the keys of the first row."""
    heads = list(rows[0])
    cells = [[str(row[head]) for head in heads] for row in rows]
    widths = [max(len(line[index]) for line in [heads, *cells]) for index in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--toy", action="store_true", help="at toy size, to see that it works")
    return parser
