"""Best, first and last evaluation so far, so that a tracker's summary is right whenever the run ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tally:
    """Follows the evaluations of a run as the loop judges them: the one before training is the first, never the best.

    `best`: the metric that decides, such as eval/loss. `mode`: min or max.
    """

    def __init__(self, best: str, mode: str) -> None:
        self.key, self.sign = best.removeprefix("eval/"), 1 if mode == "min" else -1
        self.values: dict[str, Any] = {}

    def note(self, step: int, record: Mapping[str, Any]) -> None:
        self.values["last"] = dict(record)
        if step == 0:
            self.values["first"] = dict(record)
        elif isinstance(value := record.get(self.key), int | float):
            best = self.values.get("best")
            if best is None or self.sign * value < self.sign * best:
                self.values |= {"best": value, "best_step": step}

    def read(self, metrics: Path) -> None:
        """Begin anew from what metrics.jsonl holds."""
        self.values = {}
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        for record in map(json.loads, lines):
            if record["split"] == "eval":
                values = {name: value for name, value in record.items() if name not in ("step", "split")}
                self.note(record["step"], values)
