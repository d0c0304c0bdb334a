"""What a verification found: a line a check, in one form wherever it was made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distft.errors import NegativeVerdict


@dataclass(frozen=True)
class Finding:
    """One check. `passed` is None where it could not be made; `said` then tells why, else what was seen.

    `value`: the number that was measured, where it is one.
    """

    what: str
    passed: bool | None
    said: str
    value: float | None = None

    def __str__(self) -> str:
        mark = {True: "ok", False: "WRONG", None: "left out"}[self.passed]
        return f"{mark:<9} {self.what}: {self.said}"


def refuse_wrong(findings: Iterable[Finding]) -> None:
    """
    Raises:
        NegativeVerdict: the first thing that is wrong, and how many more there are.
    """
    wrong = [finding for finding in findings if finding.passed is False]
    if wrong:
        more = f" ({len(wrong) - 1} more checks failed.)" if len(wrong) > 1 else ""
        raise NegativeVerdict(f"{wrong[0].said}{more}")


def verdict(findings: Iterable[Finding]) -> str:
    """All of it in one line."""
    findings = list(findings)
    wrong = [finding.what for finding in findings if finding.passed is False]
    passed = sum(finding.passed is True for finding in findings)
    skipped = [finding.what for finding in findings if finding.passed is None]
    text = f"{passed} of {len(findings)} checks passed"
    if wrong:
        text = f"wrong: {', '.join(wrong)}; {text}"
    else:
        text = f"nothing wrong; {text}"
    return f"{text}; left out: {', '.join(skipped)}" if skipped else text
