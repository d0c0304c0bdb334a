"""`data.max_rejected=0`: rows are looked at before anything heavy is loaded, so that a bad one is told in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from distft.config.schema import Run
from distft.data.cache import REJECTED
from distft.data.encode import reasons
from distft.data.rows import BadRow, Unfit, trainable
from distft.data.sources import SourceSpec, eval_source_of, read_rows, sources_of
from distft.data.tokenise import Tally, bad_row, line_of
from distft.errors import UserMistake

LOOK_SECONDS = 3.0  # for all sources; what comes behind is seen while it is tokenised


def refuse_bad_rows(run: Run, out: Path) -> None:
    """Look at the rows of a strict run as long as `LOOK_SECONDS`, without tokenizer or model.

    Bad ones are listed in `<out>/rejected.jsonl`. What only a chat template or the tokens tell is left to `prepare`.

    Raises:
        UserMistake: one cannot be used.
    """
    if run.data.max_rejected > 0:
        return
    deadline = time.monotonic() + LOOK_SECONDS
    eval_spec = eval_source_of(run.data, run.objective.name)
    told = []
    (out / REJECTED).unlink(missing_ok=True)
    for spec in [*sources_of(run.data, run.objective.name), *([eval_spec] if eval_spec else [])]:
        tally = Tally(spec)
        lines = []
        for bad in looked_at(spec, run.objective.name, tally, deadline):
            tally.reject(bad)
            lines.append(line_of(spec, bad))
        if lines:
            out.mkdir(parents=True, exist_ok=True)
            with (out / REJECTED).open("a", encoding="utf-8") as file:
                file.writelines(lines)
            total = f"{tally.rows + len(lines):,}"
            told.append(f"{len(lines):,} of the {total} rows of {spec.name} that were looked at cannot be used: "
                        f"{reasons(tally.report())}.")  # fmt: skip
    if told:
        raise UserMistake(
            f"{' '.join(told)} data.max_rejected=0 allows none. They are listed in {out / REJECTED}: mend them, or "
            "raise data.max_rejected."
        )


def looked_at(spec: SourceSpec, objective: str, tally: Tally, deadline: float) -> Iterator[BadRow]:
    """The bad rows of a source up to the deadline; the good ones are counted."""
    for row in read_rows(spec):
        if isinstance(row, BadRow):
            yield row
        else:
            try:
                trainable(spec.columns.document(row.value), objective)
                tally.rows += 1
            except Unfit as fault:
                yield bad_row(row, fault)
        if time.monotonic() > deadline:
            return
