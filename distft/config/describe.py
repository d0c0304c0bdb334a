"""The text of `--help`: every knob with its default, its words and what it does."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from distft.config.schema import Source
from distft.config.words import Knob, docs_of, knobs

HEAD = {
    "train": "Fine-tune a language model. Run it as: python train.py [group=choice …] [key=value …] [-m]",
    "check": "Prove on a run's own model and data what distft promises. Run it as: distft check run=<run folder> or "
    "distft check [group=choice …] [key=value …]",
    "doctor": "Tell whether a run would start on these machines, and what would slow it down. Run it as: distft doctor "
    "[group=choice …] [key=value …]",
    "generate": "Answer a prompt with a trained model. Run it as: distft generate <folder> [key=value …]",
    "report": "Compare the jobs of a sweep: a table, a page, and whether there is a winner. Run it as: distft report "
    "<sweep folder> [report.output=FILE]",
    "verify": "Tell whether a checkpoint, a model or an adapter is what was saved. Run it as: distft verify <folder> "
    "[key=value …]",
}
FOOT = """\
Several values and -m make a sweep: optim.lr=1e-3,1e-4; with hydra/sweeper=optuna a search, over intervals too:
'optim.lr=tag(log, interval(1e-5, 1e-3))'. --cfg job prints what a command line comes to, --config-dir FOLDER adds
configuration files of your own, and a run folder repeats its run: --config-dir <run> --config-name config.
--hydra-help lists Hydra's flags."""


def help_text(verb: str, schema: type, groups: dict[str, list[str]]) -> str:
    """`groups`: the options of each config group."""
    parts = [HEAD[verb], ""]
    if verb in ("train", "check", "doctor"):
        parts += [
            "Groups (group=choice):",
            *(f"  {group}={', '.join(options)}" for group, options in sorted(groups.items())),
            "",
        ]
    parts.append("Knobs (key=value):")
    section = None
    for knob in knobs(schema, docs=True):
        prefix = knob.name.rpartition(".")[0]
        if prefix != section:
            section = prefix
            parts.append("")
        parts.append(entry(knob))
    return "\n".join([*parts, "", FOOT] if verb == "train" else parts)


def entry(knob: Knob) -> str:
    """One knob: `name=default` and beneath it what it does."""
    about = knob.doc
    of_source = re.match(r"See `Source\.(\w+)`[.;]? ?", about)
    if of_source:
        about = f"{docs_of(Source)[of_source.group(1)]} {about[of_source.end() :].capitalize()}".strip()
    if len(knob.choices) > 1:
        about = f"[{', '.join(shown(choice) for choice in knob.choices)}] {about}".strip()
    lines = textwrap.wrap(about, width=106) if about else []
    return "\n".join([f"  {knob.name}={shown(knob.default)}", *(f"      {line}" for line in lines)])


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{','.join(shown(item) for item in value)}]"
    return str(value)
