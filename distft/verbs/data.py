"""`distft data prepare` makes the tokenised data of a run, on any machine; `distft data show` prints some rows too."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console

from distft import errors
from distft.config.schema import Run


def main(run: Run, sub: str, rows: int) -> int:
    """Prepare, then report (`sub` is prepare) or show `rows` rows of each source as well (`sub` is show).

    What is made is what a run of the same configuration finds. Returns the exit code.

    Raises:
        UserMistake: with the knob and the cure.
    """
    from distft.cache import cache_folder
    from distft.data.encode import prepare
    from distft.data.see import report, show_rows
    from distft.data.sources import texts
    from distft.data.template import settle_template
    from distft.model.decode import stop_ids
    from distft.model.folder import load_tokenizer, resolve
    from distft.objective import make_encoder

    tokenizer = load_tokenizer(resolve(run, partial(texts, run)), run)
    if run.objective.name == "sft":
        settle_template(tokenizer, run.data.chat_template)
    out = cache_folder(run.data) / "rejected" / run.data.name
    with tempfile.TemporaryDirectory(prefix="distft-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        prepared = prepare(run, tokenizer, Path(folder), out, make_encoder)
    console = Console()
    if sub == "show":
        show_rows(console, prepared, rows, tokenizer, stop_ids(tokenizer, Path(tokenizer.name_or_path)))
    report(console, prepared, run.data.sequence_length)
    if sub == "prepare":
        console.print(f"Ready in {prepared.path}", highlight=False, soft_wrap=True)
    return errors.DONE
