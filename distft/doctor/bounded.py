"""One check by itself: what it raises is its verdict, and one that hangs is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

from distft.config.redact import redact
from distft.doctor.verdict import FAILS, Verdict

Check = Callable[[], list[Verdict]]


def bounded(what: str, check: Check, seconds: float, state: str = FAILS, cure: str = "") -> list[Verdict]:
    """The verdicts of `check`, or one of `state` where it raises or has not ended after `seconds`.

    A check that hangs, such as one in a file system that does not answer, keeps its thread, which ends with the
    process.
    """
    found: list[list[Verdict]] = []

    def work() -> None:
        try:
            found.append(check())
        except (Exception, SystemExit) as error:
            found.append([Verdict(what, state, why(error), cure)])

    thread = threading.Thread(target=work, name=f"doctor: {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        return [Verdict(what, state, f"no answer within {seconds:g} s (doctor.seconds)", cure)]
    return found[0]


def why(error: BaseException) -> str:
    """An exception in one line, without secrets."""
    lines = str(error).strip().splitlines()
    return redact(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)[:300]
