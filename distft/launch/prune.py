"""A sweep asks a run to end as pruned: a file in its folder, which rank 0 looks for and all ranks agree on.

Whoever compares the runs of a sweep (sweep/watch.py) writes it. It holds the reason, and is gone once it was heeded, so
that a person can go on with the run.
"""

from __future__ import annotations

import time
from pathlib import Path

REQUEST = "prune.txt"
LOOK_SECONDS = 0.5  # a file system of a network answers slowly


def request(run_dir: Path, reason: str) -> None:
    """Ask the run that lies in `run_dir` to end as pruned. What cannot be written is asked again at the next time."""
    staged = run_dir / f"{REQUEST}.tmp"
    try:
        staged.write_text(reason, encoding="utf-8")
        staged.replace(run_dir / REQUEST)
    except OSError:
        staged.unlink(missing_ok=True)


def withdraw(run_dir: Path, status: str) -> str | None:
    """Take a request away at the end of a run. Returns why a run with status `pruned` was, None of any other."""
    path, reason = run_dir / REQUEST, "its sweep asked for it"
    try:
        reason = path.read_text(encoding="utf-8")
        path.unlink()
    except OSError:  # most runs never have one
        pass
    return reason if status == "pruned" else None


class PruneFlag:
    """Whether this run is asked to end: looked for by rank 0 alone, twice a second."""

    def __init__(self, run_dir: Path, active: bool) -> None:
        self.path, self.active = run_dir / REQUEST, active
        self.next_look = 0.0
        self.seen = False

    def __call__(self) -> bool:
        if self.active and not self.seen and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + LOOK_SECONDS
            self.seen = self.path.is_file()
        return self.seen
