"""A progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
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


SHOWN: dict[str, Callable[[Any], str]] = {
    "loss": lambda loss: f"loss {loss:.4f}",
    "grad_norm": lambda norm: f"norm {norm:.3g}",
    "learning_rate": lambda rate: f"lr {rate:.2e}",
    "tokens_per_second": lambda rate: f"{short(rate)} tokens/s",
    "mfu": lambda share: f"{share:.1%} MFU",
    "memory_peak_bytes": lambda size: f"{size / 2**30:.1f} GiB",
    "skipped": lambda steps: f"{steps} skipped" if steps else "",
}
FIRST_TO_GO = ("grad_norm", "mfu", "learning_rate", "memory_peak_bytes", "tokens_per_second")


def told(record: Mapping[str, Any], width: int = 1000) -> str:
    """What of a training record is worth a glance, in at most `width` columns if that can be."""
    parts = {name: text for name, show in SHOWN.items() if name in record and (text := show(record[name]))}
    for name in FIRST_TO_GO:
        if len("  ".join(parts.values())) > width:
            parts.pop(name, None)
    return "  ".join(parts.values())


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
        self.bar_width = 20 if self.console.width >= 120 else 8
        self.first = first

    def open(self) -> None:
        """Show the bar from the first record on, so that what is said before it stands in plain lines."""
        if self.bar is None and self.console.is_terminal and not self.console.is_dumb_terminal:
            whole = Column(no_wrap=True)
            self.bar = Progress(
                MofNCompleteColumn(table_column=whole),
                BarColumn(bar_width=self.bar_width),
                TextColumn("{task.fields[told]}", table_column=whole),
                TimeLeft(table_column=whole),
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
            width = self.console.width - 2 * len(str(self.num_steps)) - self.bar_width - len("/  0:00:00 left ")
            self.bar.update(self.task, completed=step, told=told(record, width), left=left, at=time.monotonic())
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
