from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema.knob import choice

FORMATS = ("auto", "python_docs", "jsonl", "json", "csv", "parquet", "text", "saved", "hub")


@dataclass
class Source:
    """One stream of rows. The same knobs stand directly under `data` for the common case of a single source."""

    path: str | None = None
    """File, folder or hub id."""

    name: str | None = None
    """Name in metrics; default: the path's stem."""

    weight: float | None = None
    """Relative share of the bins of a step. Given for all sources or for none; none: every row once an epoch."""

    format: str = choice(*FORMATS)
    """auto: from the file's ending. saved: a folder written by `datasets.save_to_disk`. hub: a hub id."""

    columns: dict[str, Any] = field(default_factory=dict)
    """Jinja templates over a row's columns by role: system, user, assistant, prompt, completion, text; `messages`
    and `id` name a column. Empty: recognised from the column names."""

    exclude_ids: str | None = None
    """File of row ids to leave out: lines, a JSON list, or the keys of a JSON object."""

    subset: str | None = None
    """Configuration name of a hub data set."""

    split: str = "train"
    """Split of a hub data set or a saved `DatasetDict`."""


@dataclass
class Data:
    name: str = "python_docs"
    """What the data is called in the run's name."""

    path: str | None = None
    """Training rows: file, folder or hub id (one source)."""

    format: str = choice(*FORMATS)
    """See `Source.format`."""

    columns: dict[str, Any] = field(default_factory=dict)
    """See `Source.columns`; also used for `data.eval_path`."""

    exclude_ids: str | None = None
    """See `Source.exclude_ids`."""

    subset: str | None = None
    """See `Source.subset`."""

    split: str = "train"
    """See `Source.split`."""

    sources: list[Source] = field(default_factory=list)
    """Several sources instead of `data.path`."""

    eval_path: str | None = None
    """Evaluation rows, read like `data.path`. Without it `data.eval_fraction` of every source is held out."""

    eval_split: str = "test"
    """Split of `data.eval_path` where that is a hub data set or a saved `DatasetDict`."""

    eval_fraction: float = 0.05
    """Share of rows held out for evaluation when there is no `data.eval_path`; chosen by a hash of the row."""

    sequence_length: int = 1024
    """Positions of a bin: documents are packed into bins of this length."""

    packing: Any = choice("auto", True, False)  # noqa: RUF009 (a field, seen through `Any`)
    """auto: pack if documents in a bin are provably isolated for this model, else one document a row."""

    too_long: str = choice("auto", "truncate", "split", "drop", "refuse")
    """A row longer than `data.sequence_length`; auto: truncate for sft, split for lm."""

    chat_template: str = "auto"
    """auto: the tokenizer's own; chatml: one that every tokenizer can hold; or the path of a Jinja file."""

    multi_turn: str = choice("auto", "whole", "turns")
    """auto: a conversation is one row where rendered prefixes are prefixes of the whole, else a row a turn."""

    train_on: str = choice("assistant", "all")
    """Which tokens carry loss."""

    max_rejected: float = 0.01
    """Share of unreadable or untrainable rows past which the run stops. 0: one is enough, and rows are looked at for
    some seconds before the tokenizer is loaded."""

    max_row_bytes: int = 8 * 2**20
    """Longest row that is used: bytes of a line of JSON, characters of any other row. Longer ones count as rejected and
    are never held in memory as a whole (lines) nor tokenised."""

    workers: Any = "auto"
    """Processes that tokenise; auto: the machine's cores."""

    cache_dir: str | None = None
    """Where tokenised data lies; default: $DISTFT_CACHE, else ~/.cache/distft."""
