"""The fault trials: which of them run, and the table of their results.

`make test` runs a set that takes a few minutes; `make faults` (`--all-faults`) runs every one of them, or those of the
files in ARGS, and writes the table of docs/reliability.md (`--table`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

BEGIN, END = "<!-- trials: written by `make faults` -->", "<!-- end of trials -->"
HEAD = ("trial", "file", "cases", "passed", "seconds", "day")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-faults"):
        return
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason="a longer form of a trial: make faults runs it"))


class Table:
    """How the trials ended, by the name in their marks and by file. What a session does not run, or not wholly, keeps
    the row that it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[str, str]] = {}  # trial and file, by test
        self.parts: set[str] = set()  # files of which some tests are left out
        self.outcomes: dict[str, str] = {}  # by test
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.parts |= {item.path.name for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.parts |= {Path(word.partition("::")[0]).name for word in session.config.args if "::" in word}
        for item in session.items:
            if mark := item.get_closest_marker("trial"):
                self.rows[item.nodeid] = (mark.args[0], item.path.name)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        old, _, after = rest.partition(END)
        lines = {row[:2]: row for line in old.splitlines() if len(row := cells(line)) == len(HEAD)}
        lines.pop(HEAD[:2], None)
        for row in sorted(set(self.rows.values())):
            tests = [test for test, its_row in self.rows.items() if its_row == row]
            if row[1] not in self.parts and all(test in self.outcomes for test in tests):
                passed = [self.outcomes[test] for test in tests].count("passed")
                seconds = f"{sum(self.seconds[test] for test in tests):.0f}"
                lines[row] = (*row, str(len(tests)), str(passed), seconds, time.strftime("%Y-%m-%d"))
        told = ["| " + " | ".join(line) + " |" for line in (HEAD, *(lines[row] for row in sorted(lines)))]
        told.insert(1, "|---" * len(HEAD) + "|")
        self.path.write_text("\n".join([f"{before}{BEGIN}", *told, f"{END}{after}"]), encoding="utf-8")


def cells(line: str) -> tuple[str, ...]:
    """Those of a line of a table; none of its rule."""
    return () if line.startswith("|---") else tuple(cell.strip() for cell in line.strip("| ").split(" | "))


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--table"):
        if not config.getoption("--all-faults"):
            raise pytest.UsageError("--table goes with --all-faults: its rows are of the long forms")
        config.pluginmanager.register(Table(Path(path)))
