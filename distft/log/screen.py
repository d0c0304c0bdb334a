"""A progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


def short(number: float) -> str:
    """12345 -> 12.3k, to three digits."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """3725 -> 1:02:05, 65 -> 1:05."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def told(record: Mapping[str, Any]) -> str:
    """What of a training record is worth a glance."""
    parts = [f"loss {record['loss']:.4f}"] if "loss" in record else []
    if "grad_norm" in record:
        parts.append(f"norm {record['grad_norm']:.3g}")
    if "learning_rate" in record:
        parts.append(f"lr {record['learning_rate']:.2e}")
    if "tokens_per_second" in record:
        parts.append(f"{short(record['tokens_per_second'])} tokens/s")
    if "mfu" in record:
        parts.append(f"{record['mfu']:.1%} MFU")
    if "memory_peak_bytes" in record:
        parts.append(f"{record['memory_peak_bytes'] / 2**30:.1f} GiB")
    if record.get("skipped"):
        parts.append(f"{record['skipped']} skipped")
    return "  ".join(parts)


class TimeLeft(ProgressColumn):
    """Counts down between records from what the last one foresaw."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        if left is None:
            return Text("")
        return Text(f"{clock(left - (time.monotonic() - task.fields['at']))} left", style="progress.remaining")


class Screen:
    """Writes to standard output. `first`: the step that the run starts from."""

    def __init__(self, num_steps: int, first: int) -> None:
        self.num_steps = num_steps
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.first = first

    def open(self) -> None:
        """Show the bar from the first record on, so that what is said before it stands in plain lines."""
        if self.bar is None and self.console.is_terminal and not self.console.is_dumb_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[told]}"),
                TimeLeft(),
                console=self.console,
                refresh_per_second=2,
            )
            self.task = self.bar.add_task("train", total=self.num_steps, completed=self.first, told="", left=None)
            self.bar.start()
            atexit.register(self.close)  # a crash must not leave the terminal without a cursor

    def train(self, step: int, record: Mapping[str, Any]) -> None:
        self.open()
        left = record["seconds"] * (self.num_steps - step) if "seconds" in record else None
        if self.bar is not None:
            self.bar.update(self.task, completed=step, told=told(record), left=left, at=time.monotonic())
        else:
            ending = "" if left is None else f"  {clock(left)} left"
            self.say(f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}  {told(record)}{ending}")

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        by_source = [
            f"{name.removeprefix('source/').removesuffix('/loss')} {value:.4f}"
            for name, value in record.items()
            if name.startswith("source/") and name.endswith("/loss")
        ]
        text = f"evaluation after step {step}: loss {record['loss']:.4f}" if "loss" in record else f"evaluation {step}"
        self.say(text + (f" ({', '.join(by_source)})" if by_source else ""))

    def say(self, text: str) -> None:
        if self.bar is not None or self.console.is_terminal:
            self.console.print(text)
        else:
            print(text, file=sys.stdout, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
            atexit.unregister(self.close)
