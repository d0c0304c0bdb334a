"""Lengths and points of time as people write them."""

from __future__ import annotations

import datetime
import re
from typing import Any

CLOCK = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d{2}):(\d{2})")  # [days-]hours:minutes:seconds, as Slurm writes them


def moment_of(value: Any, started: float) -> float:
    """A point of time, in seconds since 1970, from one of

    - a number, or [days-]HH:MM:SS: so long after `started`;
    - an ISO 8601 date and time: then, by this machine's clock and, unless it names another, its time zone.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, bool):
        raise ValueError(value)
    if isinstance(value, int | float):
        return started + value
    text = str(value).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return started + float(text)
    if found := CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return started + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return datetime.datetime.fromisoformat(text).timestamp()
