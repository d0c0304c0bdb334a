"""The fault trials: which of them run, and the table of their results.

`make test` runs a set that takes a few minutes; `make faults` (`--all-faults`) runs every one of them and writes the
table of docs/reliability.md (`--table`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import pytest

BEGIN, END = "<!-- trials: written by `make faults` -->", "<!-- end of trials -->"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-faults"):
        return
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason="a longer form of a trial: make faults runs it"))


class Table:
    """Collects how the trials of a session ended, by the name in their marks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, str] = {}  # of the trial, by test
        self.outcomes: dict[str, list[str]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if mark := item.get_closest_marker("trial"):
                self.names[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = self.names.get(report.nodeid)
        if name is None:
            return
        self.seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name].append(report.outcome)

    def pytest_sessionfinish(self) -> None:
        lines = ["| trial | cases | passed | seconds |", "|---|---|---|---|"]
        for name, outcomes in self.outcomes.items():
            passed = outcomes.count("passed")
            lines.append(f"| {name} | {len(outcomes)} | {passed} | {self.seconds[name]:.0f} |")
        said = f"`make faults` on {time.strftime('%Y-%m-%d')}:\n\n" + "\n".join(lines)
        text = self.path.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        self.path.write_text(f"{before}{BEGIN}\n{said}\n{END}{after}", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--table"):
        config.pluginmanager.register(Table(Path(path)))
