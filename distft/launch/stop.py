"""Signals that ask for the end: noted by the controller, which passes them on, and by every rank.

Launchers send a signal twice and a terminal sends it to all processes of a group, so the same signal again within
SAME_REQUEST_SECONDS is the same request. Later it means: at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distft import errors

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what `sbatch --signal=USR1@…` sends
SAME_REQUEST_SECONDS = 5.0


class Requests:
    """Which signals have come, and since when."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}

    def note(self, number: int, now: float) -> bool:
        """Take in a signal; `now`: seconds of a monotonic clock. Returns whether it asks to end at once."""
        return now - self.first.setdefault(number, now) > SAME_REQUEST_SECONDS


class Signals:
    """The controller's: noted while ranks run, to be passed on."""

    def __init__(self) -> None:
        self.received: list[int] = []  # each once
        self.at_once = False
        self.requests = Requests()

    @contextmanager
    def caught(self) -> Iterator[None]:
        caught = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.note) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.requests.note(number, time.monotonic()) or self.at_once
        if number not in self.received:
            self.received.append(number)


class StopFlag:
    """A rank's: looked at once a step. From now on no stop signal ends this process by itself.

    A thread takes the signals in, because Python runs a handler only between two of its own instructions: a rank that
    waits in a collective would not hear the second signal.
    """

    def __init__(self) -> None:
        self.requests = Requests()
        self.reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self.listen, name="stop signals", daemon=True).start()

    def listen(self) -> None:
        while numbers := os.read(self.reading, 64):
            for number in numbers:
                if number in STOP_SIGNALS and self.requests.note(number, time.monotonic()):
                    sys.stderr.write(f"distft: a second {name_of(number)}: ended at once, nothing more is saved.\n")
                    sys.stderr.flush()
                    os._exit(errors.ENDED_AT_ONCE)

    def __call__(self) -> list[bool]:
        """Which of STOP_SIGNALS have come."""
        return [number in self.requests.first for number in STOP_SIGNALS]


def name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
