"""What a look at a machine found: a line a check, and whether a run would fail there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

OK, WARN, FAILS, SKIPPED = "ok", "warn", "fails", "skipped"
COUNTED = {OK: "ok", WARN: "to be warned of", FAILS: "would make a run fail", SKIPPED: "skipped"}


@dataclass(frozen=True)
class Verdict:
    """One check. `state` is fails where a run would fail, warn where it would suffer; `cure`: what then helps."""

    what: str
    state: str
    said: str
    cure: str = ""
    where: str = ""  # the hosts that it is about; empty: all that were looked at

    def __str__(self) -> str:
        place = f" on {self.where}" if self.where else ""
        cure = f"\n{'':<11}{self.cure}" if self.cure and self.state in (WARN, FAILS) else ""
        return f"{self.state:<9} {self.what}{place}: {self.said}{cure}"


def worst(what: str, found: Sequence[Verdict], good: str) -> list[Verdict]:
    """What was found to be wrong, or one line that says what is `good`."""
    return list(found) or [Verdict(what, OK, good)]


def merged(reports: Mapping[str, Sequence[Verdict]]) -> list[Verdict]:
    """The verdicts of several hosts by their names, each said once, with the hosts where not all say it.

    What is well on several hosts is told of the first. In the order of the first host.
    """
    said: dict[tuple[str, ...], list[str]] = {}
    having: dict[str, int] = {}  # how many hosts looked at it
    first: dict[str, Verdict] = {}
    for host, verdicts in reports.items():
        for what in dict.fromkeys(verdict.what for verdict in verdicts):
            having[what] = having.get(what, 0) + 1
        for verdict in verdicts:
            if verdict.state == OK:
                verdict = first.setdefault(verdict.what, verdict)
            said.setdefault((verdict.what, verdict.state, verdict.said, verdict.cure), []).append(host)
    lines = [
        Verdict(what, state, text, cure, "" if len(hosts) == having[what] else listed(hosts))
        for (what, state, text, cure), hosts in said.items()
    ]
    order = list(having)
    return sorted(lines, key=lambda verdict: order.index(verdict.what))


def listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def verdict_line(verdicts: Iterable[Verdict]) -> str:
    """All of it in one line."""
    verdicts = list(verdicts)
    failing = list(dict.fromkeys(verdict.what for verdict in verdicts if verdict.state == FAILS))
    counts = [
        f"{number} {words}"
        for state, words in COUNTED.items()
        if (number := sum(verdict.state == state for verdict in verdicts))
    ]
    opening = f"A run would fail: {', '.join(failing)}" if failing else "A run can start"
    return f"{opening}; {', '.join(counts)}"


def would_fail(verdicts: Iterable[Verdict]) -> bool:
    return any(verdict.state == FAILS for verdict in verdicts)


def as_dict(verdict: Verdict) -> dict[str, str]:
    return dataclasses.asdict(verdict)
