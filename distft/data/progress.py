"""How far a long preparation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """One line for the user, on the error stream so that answers on the output stream stay clean."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


class Progress:
    """Use as a context; `advance` by the sizes of what is done, which add up to `total`."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, max(1, total), 0
        self.told_at = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        console = Console(stderr=True)
        if console.is_terminal:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self.bar.__enter__()
            self.task = self.bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.__exit__(kind, error, trace)

    def advance(self, size: int) -> None:
        self.done += size
        if self.bar is not None:
            self.bar.advance(self.task, size)
        elif time.monotonic() - self.told_at >= SECONDS_BETWEEN_LINES:
            self.told_at = time.monotonic()
            say(f"{self.title}: {min(1.0, self.done / self.total):.0%}")
