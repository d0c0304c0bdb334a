"""How a knob with a closed set of words is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def choice(default: Any, *others: Any) -> Any:
    """A field whose value is `default` or one of `others`; check.py refuses every other word."""
    return field(default=default, metadata={"choices": (default, *others)})
