"""What of a run was given rather than left at its default."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from distft.config.schema import Run
from distft.config.words import Knob, knobs

SURROUNDINGS = (
    *("launch", "log", "run", "sweep"),
    *("resume", "resume_allow", "data.name", "data.workers", "data.cache_dir"),
)
"""Knobs, or sections of them: where a run is started and what it tells, never what it computes."""


@functools.cache
def all_knobs() -> dict[str, Knob]:
    return {knob.name: knob for knob in knobs(Run)}


def within(name: str, sections: Sequence[str]) -> bool:
    """Whether a knob, or a section that holds it, is among `sections`."""
    return any(f"{name}.".startswith(f"{section}.") for section in sections)


def value_of(run: Run, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), run)


def is_default(run: Run, name: str) -> bool:
    return bool(value_of(run, name) == all_knobs()[name].default)


def ignored(run: Run, names: list[str], why: str, instead: str = "") -> Iterator[str]:
    """A problem for each of these knobs that was given although nothing will read it. `instead`: what would have it
    read."""
    for name in names:
        if not is_default(run, name):
            default = all_knobs()[name].default
            shown = "its default" if default in (None, [], {}) else f"{name}={default}, its default"
            leave = f"{instead}, or leave" if instead else "Leave"
            yield f"{name}={value_of(run, name)} has no effect {why}. {leave} it at {shown}."
