"""`distft data prepare` makes the tokenised data of a run, on any machine; `distft data show` prints some rows too."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distft import errors
from distft.config.schema import Run
from distft.config.words import nearest
from distft.errors import UserMistake

SUBS = ("prepare", "show")


def words_of(argv: Sequence[str]) -> tuple[str, int, list[str]]:
    """What is wanted (prepare or show), `show.rows`, and the words of the run.

    Raises:
        UserMistake: neither is wanted, or `show.rows` is no number or stands beside prepare.
    """
    sub = next((word for word in argv if not word.startswith("-") and "=" not in word), None)
    if sub not in SUBS:
        near = nearest(sub, SUBS) if sub else None
        raise UserMistake(
            f"distft data {sub or ''}: prepare or show is wanted." + (f" Did you mean {near}?" if near else "")
        )
    rows, rest = 3, []
    for word in argv:
        found = re.fullmatch(r"\+*show\.rows=(.*)", word)
        if found is None:
            rest.append(word)
        elif sub != "show" or not found.group(1).isdigit() or int(found.group(1)) < 1:
            raise UserMistake(f"{word}: a whole number from 1 is wanted, with `distft data show` alone.")
        else:
            rows = int(found.group(1))
    rest.remove(sub)
    return sub, rows, rest


def main(run: Run, sub: str, rows: int) -> int:
    """Prepare, then report (`sub` is prepare) or show `rows` rows of each source as well (`sub` is show).

    What is made is what a run of the same configuration finds. Returns the exit code.

    Raises:
        UserMistake: with the knob and the cure.
    """
    from rich.console import Console

    from distft.cache import cache_folder
    from distft.data.strict import refuse_bad_rows

    out = cache_folder(run.data) / "rejected" / run.data.name
    refuse_bad_rows(run, out)
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
