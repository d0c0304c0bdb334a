"""A tracker on its own thread, so that neither a slow network nor a failing service reaches training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

LONGEST_QUEUE = 10_000  # records; more than this waits only behind a tracker that hangs
LONGEST_END = 75.0  # seconds that the end of a run waits for its tracker


class Tracker(Protocol):
    """Where metrics are shown: imports in `load`; then, on one thread, `start` first and `finish` last.

    `abandon`: one that has failed or hangs lets go of what would keep the process; called from another thread.
    """

    def load(self) -> None: ...

    def start(self) -> None: ...

    def metrics(self, split: str, step: int, record: dict[str, Any]) -> None: ...

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...

    def go_back(self, step: int) -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def alert(self, title: str, text: str, level: str) -> None: ...

    def abandon(self) -> None: ...

    def finish(self, status: str, summary: dict[str, Any]) -> None: ...


class Background:
    """Calls `tracker` in order on a thread. Its first failure is said once and ends it; the run goes on.

    `load` runs at once, on the caller's thread: two threads that import packages with cycles, as these do, can see
    half-made modules.
    """

    def __init__(self, tracker: Tracker, name: str, say: Callable[[str], None]) -> None:
        self.tracker, self.name, self.say = tracker, name, say
        self.queue: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(LONGEST_QUEUE)
        self.broken = False
        self.thread = threading.Thread(target=self.work, name=f"distft-{name}", daemon=True)
        try:
            self.tracker.load()
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {error}")
        self.call("start")
        self.thread.start()

    def call(self, method: str, *arguments: Any) -> None:
        """Hand over one call; never waits."""
        if self.broken:
            return
        try:
            self.queue.put_nowait((method, arguments))
        except queue.Full:
            self.give_up("it does not answer")

    def work(self) -> None:
        while True:
            method, arguments = self.queue.get()
            if not self.broken:
                try:
                    getattr(self.tracker, method)(*arguments)
                except Exception as error:  # whatever a tracker raises, training goes on
                    self.give_up(f"{type(error).__name__}: {error}")
            if method == "finish":
                return

    def give_up(self, reason: str) -> None:
        if not self.broken:
            self.broken = True
            self.say(f"{self.name} is off for the rest of this run ({reason}). Training and metrics.jsonl go on.")

    def close(self, status: str, summary: dict[str, Any]) -> None:
        """Let it finish, for LONGEST_END seconds at most."""
        self.call("finish", status, summary)
        if not self.broken:
            self.thread.join(LONGEST_END)
            if self.thread.is_alive():
                self.give_up("it did not finish in time")
        if self.broken:
            self.tracker.abandon()
