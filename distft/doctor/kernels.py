"""The kernels' trials, each bounded: where one ends its process or hangs, a new process goes on with the next."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from distft.doctor.trials import MARK, TRIALS, ended
from distft.doctor.verdict import FAILS, Verdict
from distft.launch.stop import name_of

START_SECONDS = 60.0  # more, for the first trial of a process: torch is imported in it


def look(needed: Sequence[str], seconds: float) -> list[Verdict]:
    """Try every kernel. `needed`: those without which the run fails; of the others a run takes one that works."""
    found: dict[str, Verdict] = {}
    while left := [name for name in TRIALS if name not in found]:
        before = len(found)
        for name, verdict in run_child(left, needed, seconds):
            found[name] = verdict
        if len(found) == before:
            lost = f"the process that tries them ended before {left[0]}"
            return [*found.values(), Verdict("kernels", FAILS, lost, "Does `python -c 'import torch'` work?")]
    return list(found.values())


def run_child(names: Sequence[str], needed: Sequence[str], seconds: float) -> Iterator[tuple[str, Verdict]]:
    """The verdicts of one child, as they come; the last may be that it died or hung in a trial."""
    command = [sys.executable, "-m", "distft.doctor.trials", json.dumps([list(names), list(needed)])]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, errors="replace",
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=pour, args=(child, lines), daemon=True).start()
    trying = ""
    deadline = time.monotonic() + seconds + START_SECONDS
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if trying:
                    yield trying, ended(trying, f"no answer within {seconds:g} s (doctor.seconds)", needed)
                return
            if line is None:
                if trying:
                    yield trying, ended(trying, death(child.wait()), needed)
                return
            if not line.startswith(MARK):
                continue
            told = json.loads(line.removeprefix(MARK))
            if "begins" in told:
                trying, deadline = told["begins"], time.monotonic() + seconds
            else:
                trying = ""
                yield told["name"], Verdict(**told["verdict"])
    finally:
        child.kill()
        child.wait()


def pour(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def death(code: int) -> str:
    return f"its process was ended by {name_of(-code)}" if code < 0 else f"its process ended with exit code {code}"
