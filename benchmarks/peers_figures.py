"""From runs to medians, ratios and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peers_cases import Bar
from peers_measure import Measured

NUMBERS = (
    "tokens_per_second", "supervised_per_second", "seconds_per_step", "processor_per_step", "tokens_per_step",
    "supervised_per_step", "memory", "memory_training", "start",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """All runs of one program with one setting in one cell."""

    case: str
    program: str
    setting: str
    meaning: str
    runs: list[Measured]

    def median(self, measure: str) -> float:
        return statistics.median(getattr(run, measure) for run in self.runs)

    def told(self) -> dict[str, Any]:
        medians = {measure: self.median(measure) for measure in NUMBERS}
        return {
            "case": self.case,
            "program": self.program,
            "setting": self.setting,
            "meaning": self.meaning,
            "median": medians,
            "runs": [asdict(run) for run in self.runs],
        }


def best(entries: Iterable[Entry], measure: str) -> Entry:
    """The fastest, or, of what is spent, the one that spends least."""
    if measure.endswith("per_second"):
        return max(entries, key=lambda entry: entry.median(measure))
    return min(entries, key=lambda entry: entry.median(measure))


def fastest_settings(entries: Sequence[Entry]) -> list[Entry]:
    """Each program of each cell once, at its fastest setting."""
    keys = dict.fromkeys((entry.case, entry.program) for entry in entries)
    return [best((e for e in entries if (e.case, e.program) == key), "supervised_per_second") for key in keys]


def bar_ratio(bar: Bar, entries: Sequence[Entry], setting: str) -> tuple[float, Entry] | None:
    """Ours at `setting` to the best of those that the bar names, at whichever of theirs; None: not measured."""
    here = [entry for entry in entries if entry.case == bar.case]
    ours = [entry for entry in here if (entry.program, entry.setting) == ("distft", setting)]
    theirs = [entry for entry in here if entry.program in bar.against]
    if not ours or not theirs:
        return None
    rival = best(theirs, bar.measure)
    return ours[0].median(bar.measure) / rival.median(bar.measure), rival


def cell_ratio(case: str, entries: Sequence[Entry]) -> float | None:
    """Supervised tokens/s of ours to the fastest of the others."""
    here = [entry for entry in fastest_settings(entries) if entry.case == case]
    ours = [entry for entry in here if entry.program == "distft"]
    theirs = [entry for entry in here if entry.program != "distft"]
    if not ours or not theirs:
        return None
    rival = best(theirs, "supervised_per_second")
    return ours[0].median("supervised_per_second") / rival.median("supervised_per_second")


ALIKE = 1.25  # times the tokens that the program with fewest takes a step, in the same cell


def uneven(entries: Sequence[Entry]) -> list[str]:
    """What must not be compared: programs of one cell whose steps are not about as large."""
    told = []
    for case in dict.fromkeys(entry.case for entry in entries):
        here = sorted((e for e in entries if e.case == case), key=lambda entry: entry.median("tokens_per_step"))
        if here[-1].median("tokens_per_step") > ALIKE * here[0].median("tokens_per_step"):
            sizes = ", ".join(f"{e.program} ({e.setting}) {e.median('tokens_per_step'):,.0f}" for e in here)
            told.append(f"{case} compares unlike work, tokens a step: {sizes}")
    return told


CLOSE = 1.1  # a cell under this ratio is explained by what both have to compute


def pairs(entries: Sequence[Entry], below: float) -> list[tuple[Entry, Entry]]:
    """Ours and the fastest of the others, in the cells where ours is not `below` times as fast."""
    found = []
    for case in dict.fromkeys(entry.case for entry in entries):
        here = [entry for entry in fastest_settings(entries) if entry.case == case]
        theirs = [entry for entry in here if entry.program != "distft"]
        ratio = cell_ratio(case, entries)
        if ratio is not None and ratio < below:
            ours = next(entry for entry in here if entry.program == "distft")
            found.append((ours, best(theirs, "supervised_per_second")))
    return found


def operation_lines(counted: Sequence[tuple[Entry, float, Entry, float]]) -> list[list[str]]:
    """Heading and rows: what the fastest other program computes for a supervised token, to what distft does."""
    lines = [["case", "against", "MFLOP a supervised token", "of distft", "more", "faster"]]
    for ours, our_operations, rival, operations in counted:
        faster = ours.median("supervised_per_second") / rival.median("supervised_per_second")
        lines.append(
            [
                ours.case,
                f"{rival.program} ({rival.setting})",
                f"{operations / 1e6:,.1f}",
                f"{our_operations / 1e6:,.1f}",
                f"{operations / our_operations:.2f} x",
                f"{faster:.2f} x",
            ]
        )
    return lines


def table(entries: Sequence[Entry]) -> list[list[str]]:
    """Heading and rows: a line for every entry; `distft /` is ours divided by it in the same cell."""
    lines = [
        [
            "case", "program", "setting", "supervised/s", "distft /", "tokens/s", "s/step", "CPU s/step", "tokens/step",
            "peak MB", "start s", "loss 1",
        ]
    ]  # fmt: skip
    for entry in entries:
        ours = [other for other in entries if other.case == entry.case and other.program == "distft"]
        rate = entry.median("supervised_per_second")
        ratio = best(ours, "supervised_per_second").median("supervised_per_second") / rate if ours else None
        lines.append(
            [
                entry.case,
                entry.program,
                entry.setting,
                f"{rate:,.0f}",
                "" if ratio is None else f"{ratio:.2f} x",
                f"{entry.median('tokens_per_second'):,.0f}",
                f"{entry.median('seconds_per_step'):.2f}",
                f"{entry.median('processor_per_step'):.2f}",
                f"{entry.median('tokens_per_step'):,.0f}",
                f"{entry.median('memory') / 1e6:,.0f}",
                f"{entry.median('start'):.1f}",
                f"{entry.runs[0].losses[0]:.2f}",
            ]
        )
    return lines


def bar_lines(bars: Sequence[Bar], entries: Sequence[Entry]) -> list[list[str]]:
    """Heading and rows: what each bar asks and what was reached, once for every setting of ours.

    A setting that holds the bar of memory has to hold those of speed as well.
    """
    lines = [["distft", "bar", "measure", "against", "asked", "reached", ""]]
    for setting in dict.fromkeys(entry.setting for entry in entries if entry.program == "distft"):
        for bar in bars:
            reached = bar_ratio(bar, entries, setting)
            if reached is None:
                continue
            ratio, rival = reached
            held = ratio <= bar.ratio if bar.at_most else ratio >= bar.ratio
            lines.append(
                [
                    setting,
                    bar.case,
                    bar.measure,
                    f"{rival.program} ({rival.setting})",
                    f"{'at most' if bar.at_most else 'at least'} {bar.ratio} x",
                    f"{ratio:.2f} x",
                    "held" if held else "MISSED",
                ]
            )
    return lines
