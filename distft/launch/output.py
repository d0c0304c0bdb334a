"""What a rank prints, kept in logs/rank-N.log as well."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
from pathlib import Path
from typing import IO, Any

from distft.config.redact import redact

CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
REDRAW = re.compile(r"\x1b\[[0-9]*[AKJ]|\x1b\[\?25[lh]|\r(?!\n)")


class Tee:
    """A text stream that also writes to a log: without colours, and without the redrawing of a progress bar."""

    def __init__(self, stream: IO[str], log: IO[str]) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        count = self.stream.write(text)
        plain = CONTROL.sub("", text)
        if REDRAW.search(text):
            # Lines that scroll by above a bar are complete; the bar itself ends in no newline.
            plain = "".join(line for line in plain.replace("\r", "").splitlines(keepends=True) if line.endswith("\n"))
        if plain and not self.log.closed:
            with contextlib.suppress(OSError):  # a full disk: the terminal has it
                self.log.write(redact(plain))
        return count

    def flush(self) -> None:
        self.stream.flush()
        if not self.log.closed:
            with contextlib.suppress(OSError):
                self.log.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep(run_dir: Path, rank: int) -> None:
    """From now on keep what this process prints in its log, if it does not go there anyway.

    A crash of the interpreter itself leaves its stack there too.
    """
    path = run_dir / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (os.fstat(1).st_dev, os.fstat(1).st_ino) == (path.stat().st_dev, path.stat().st_ino):
        faulthandler.enable()
        return
    log = path.open("a", encoding="utf-8", buffering=1)
    sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)
    faulthandler.enable(file=log)
