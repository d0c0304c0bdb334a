from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What `distft report` leaves."""

    output: str | None = None
    """File for the page. Default: report.html in the sweep's folder."""


@dataclass
class ReportOn:
    """Everything that decides how `distft report <sweep folder>` tells of a sweep."""

    report: Report = field(default_factory=Report)
