"""Rows as the model sees them, and a report of what became of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distft.data.cache import EncodedSource, PreparedData
from distft.data.pack import fill_bins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED, STOP = "green", "bold reverse green"
TRAINED_OPEN, TRAINED_CLOSE, STOP_MARK = "⟦", "⟧", "■"  # where there are no colours


class Run(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    trained: bool
    stop: bool


def runs_of(
    ids: np.ndarray, trained: np.ndarray, tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int]
) -> Iterator[Run]:
    """Divide a row where trained begins or ends and around every stop token.

    The tokens of a part are decoded together: one character can be several of them.
    """
    stops = np.isin(ids, list(stop_ids))
    kinds = trained.astype(np.int64) + 2 * stops
    cuts = [0, *(np.flatnonzero((np.diff(kinds) != 0) | stops[1:]) + 1).tolist(), len(ids)]
    for start, end in pairwise(cuts):
        if start < end:
            text = str(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False))
            yield Run(text, bool(trained[start]), bool(stops[start]))


def coloured(runs: Sequence[Run]) -> Text:
    """For a terminal: trained tokens coloured, stop tokens in reverse."""
    text = Text()
    for run in runs:
        style = (STOP if run.stop else TRAINED) if run.trained else ("reverse dim" if run.stop else "dim")
        text.append(run.text, style=style)
    return text


def marked(runs: Sequence[Run]) -> str:
    """For everything else: what is trained between ⟦ and ⟧, a ■ behind every stop token."""
    text, inside = "", False
    for run in runs:
        if run.trained != inside:
            text += TRAINED_OPEN if run.trained else TRAINED_CLOSE
            inside = run.trained
        text += run.text + (STOP_MARK if run.stop else "")
    return text + (TRAINED_CLOSE if inside else "")


def show_rows(
    console: Console, prepared: PreparedData, num_rows: int, tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int]
) -> None:
    """Print `num_rows` rows of each training source, evenly spaced, as the model sees them."""
    for source in prepared.train:
        for index in np.linspace(0, len(source.lengths) - 1, min(num_rows, len(source.lengths))).astype(int).tolist():
            ids, trained = source.row(index)
            said = int(source.supervised[index])
            heading = f"{source.name} · row {source.row_id(index)} · {len(ids)} tokens, {said} of them trained"
            console.rule(Text(heading), align="left")
            runs = list(runs_of(ids, trained, tokenizer, stop_ids))
            if console.is_terminal:
                console.print(coloured(runs), soft_wrap=True)
            else:
                console.print(marked(runs), markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(
            Text.assemble(("trained", TRAINED), ", ", ("trained stop token", STOP), ", ", ("not trained", "dim"))
        )
    else:
        console.print(f"{TRAINED_OPEN}trained{TRAINED_CLOSE}, {STOP_MARK} behind a stop token", markup=False)


def report(console: Console, prepared: PreparedData, sequence_length: int) -> None:
    """Print a table of rows, tokens, lengths and bins, a line a source and side, then what was left out and why."""
    table = Table(title=f"Data {prepared.hash[:12]}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("source", "side", "rows", "tokens", "trained", "tokens a row", "bins", "filled"):
        justify = "left" if column in ("source", "side") else "right"
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for side, sources in (("train", prepared.train), ("eval", prepared.eval)):
        for source in sources:
            table.add_row(source.name, side, *figures(source, sequence_length).values())
    table.caption = f"tokens a row: median, 90 %, 99 %, longest; bins of {sequence_length:,}"
    table.caption_justify = "left"
    console.print(table)
    for part in prepared.reports:
        for line in left_out(part):
            console.print(f"{part['name']}: {line}", markup=False, highlight=False, soft_wrap=True)


def figures(source: EncodedSource, sequence_length: int) -> dict[str, str]:
    """The numbers of one source as they are shown."""
    lengths, bins = source.lengths, fill_bins(source.lengths, sequence_length)
    middle, ninety, ninety_nine = np.percentile(lengths, [50, 90, 99], method="nearest").tolist()
    return {
        "rows": f"{len(lengths):,}",
        "tokens": f"{lengths.sum(dtype=np.int64):,}",
        "trained": f"{source.supervised.sum(dtype=np.int64) / lengths.sum(dtype=np.int64):.1%}",
        "tokens a row": " ".join(map(str, (middle, ninety, ninety_nine, lengths.max()))),
        "bins": f"{len(bins):,}",
        "filled": f"{bins.fill(lengths, sequence_length):.2%}",
    }


def left_out(part: dict[str, Any]) -> Iterator[str]:
    """Lines about rows that were not taken as they are."""
    if part["excluded"]:
        yield f"{part['excluded']:,} rows left out by exclude_ids"
    for note, count in sorted(part["notes"].items()):
        yield f"{count:,} {note}"
    for reason, count in sorted(part["rejected"].items(), key=lambda item: -item[1]):
        places = part["first"][reason]["places"]
        more = ", …" if count > len(places) else ""
        yield f"{count:,} rejected: {reason} ({part['counted']} {', '.join(places)}{more})"
