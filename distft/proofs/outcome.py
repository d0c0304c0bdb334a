"""What a proof found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One proof, made."""

    proof: str  # packing, invariance, resume or reload
    compared: str  # what with what
    seen: str  # the number, in words
    value: float | None  # the number itself; None where nothing could be compared
    bound: float  # the largest value that passes
    passed: bool

    def line(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return f"{self.proof:<10}  {self.compared}: {self.seen} (bound {self.bound:g}). {verdict}"


def failed(proof: str, compared: str, reason: str, bound: float) -> Outcome:
    """A proof that nothing could be compared for, because a trial did not come to its end."""
    return Outcome(proof, compared, reason, None, bound, passed=False)
