"""The command line of a verb that takes `key=value`: Hydra's flags and overrides, read before Hydra does.

What is wrong here is told in our own words, all at once; what passes is handed to Hydra in a form that it takes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, OverrideType, RangeSweep, ValueType
from hydra.errors import HydraException

from distft.config.other_words import meant
from distft.config.words import nearest
from distft.errors import Mistakes, UserMistake

REFUSED_FLAGS = {
    "config_path": "--config-path would replace distft's own configuration. Use --config-dir FOLDER, which adds yours.",
    "experimental_rerun": "--experimental-rerun reads a pickle, which can run code. Repeat a run from its snapshot: "
    "--config-dir <run folder> --config-name config.",
}


class Parser(argparse.ArgumentParser):
    knob_names: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        flags = [option for action in self._actions for option in action.option_strings]
        unknown = [word for word in re.findall(r"--?[\w.-]+", message) if word not in flags]
        near = next((found for word in unknown if (found := nearest(word, flags))), None)
        knob = next((found for word in unknown if len(word) > 2 and (found := meant(word, self.knob_names))), None)
        if knob is not None and (near is None or len(near) == 2):  # -r is near to --lr, and not meant
            raise UserMistake(f"The command line cannot be read: {message}. Knobs have no dashes: write {knob}=…")
        raise UserMistake(f"The command line cannot be read: {message}." + (f" Did you mean {near}?" if near else ""))


def flag_parser(knob_names: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Hydra's own flags, so that nothing of Hydra's is missing, under our way of refusing."""
    theirs = get_args_parser()
    parser = Parser(add_help=False, parents=[theirs], conflict_handler="resolve")
    parser.knob_names = knob_names
    return parser


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line. `overrides` are the user's words; `parsed` what Hydra's grammar makes of them."""

    flags: argparse.Namespace
    overrides: list[str]
    parsed: list[Override]
    config_dir: Path | None
    config_name: str
    sweep: bool  # -m, or hydra.mode=MULTIRUN
    hydra_overrides: list[str] = field(default_factory=list)  # rewritten: what Hydra is given

    @property
    def shows_only(self) -> bool:
        """Whether Hydra prints something and nothing runs."""
        flags = self.flags
        return bool(flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)

    def hydra_argv(self, config_name: str | None = None) -> list[str]:
        """The command line that Hydra's `main` is given."""
        flags, argv = self.flags, []
        switches = ("help", "hydra_help", "resolve", "run", "multirun", "shell_completion")
        argv += [f"--{name.replace('_', '-')}" for name in switches if getattr(flags, name)]
        values = {"cfg": flags.cfg, "package": flags.package, "info": flags.info}
        argv += [f"--{name}={value}" for name, value in values.items() if value]
        argv += [f"--config-dir={self.config_dir}"] if self.config_dir else []
        argv += [f"--config-name={config_name or self.config_name}"]
        return [*argv, *self.hydra_overrides]


def read(argv: Sequence[str], primary: str, knob_names: Sequence[str]) -> CommandLine:
    """Parse flags and overrides.

    Raises:
        UserMistake, Mistakes: a flag that is refused or unknown, or an override that cannot be read.
    """
    flags = flag_parser(knob_names).parse_intermixed_args(list(argv))
    for name, reason in REFUSED_FLAGS.items():
        if getattr(flags, name) is not None:
            raise UserMistake(reason)
    shows = [name for name in ("run", "cfg", "multirun", "shell_completion", "info") if getattr(flags, name)]
    if len(shows) > 1:
        raise UserMistake(f"--{shows[0].replace('_', '-')} and --{shows[1].replace('_', '-')} exclude each other.")
    if flags.resolve and not (flags.cfg or flags.help):
        raise UserMistake("--resolve works on what --cfg or --help prints: add --cfg job, or drop it.")
    config_dir = None
    if flags.config_dir is not None:
        config_dir = Path(flags.config_dir).expanduser().absolute()
        if not config_dir.is_dir():
            raise UserMistake(f"--config-dir {flags.config_dir}: there is no such folder.")
    parsed = [] if flags.shell_completion else parse_overrides(flags.overrides, knob_names)
    sweep = flags.multirun or any(o.key_or_group == "hydra.mode" and o.value() == "MULTIRUN" for o in parsed)
    name = re.sub(r"\.ya?ml$", "", flags.config_name or primary)
    return CommandLine(flags, list(flags.overrides), parsed, config_dir, name, sweep, list(flags.overrides))


def parse_overrides(overrides: Sequence[str], knob_names: Sequence[str]) -> list[Override]:
    """Hydra's grammar over each override; those that it cannot read are told together."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(unreadable(text, error, knob_names))
            continue
        if "_target_" in text:
            problems.append(f"`{text}`: `_target_` names Python, which configuration never does. Drop it.")
        elif override.key_or_group == "hydra.searchpath":
            problems.append(f"`{text}`: use --config-dir FOLDER to add a folder of configuration files.")
        elif override.key_or_group == "hydra.run.dir":
            problems.append(f"`{text}`: use run.dir=FOLDER for the folder of a run.")
        elif override.package is not None and "hydra" in override.package:
            problems.append(f"`{text}`: a choice may not be placed below `hydra`. Drop `@{override.package}`.")
        parsed.append(override)
    if problems:
        raise Mistakes(problems)
    return parsed


def unreadable(text: str, error: Exception, knob_names: Sequence[str]) -> str:
    if "=" not in text and not text.startswith("~"):
        near = meant(text, knob_names)
        return f"`{text}` is not key=value." + (f" Did you mean {near}=…?" if near else "")
    reason = str(error).splitlines()[0]
    return f"`{text}` cannot be read ({reason}). Quote values with special characters: \"key='a value'\"."


def rewritten(text: str, override: Override, open_names: Sequence[str], added_groups: Collection[str]) -> str:
    """An override in the form that Hydra takes.

    Below a mapping of the user's own keys Hydra wants a `++`, which the user need not know. A `+` elsewhere is
    dropped (no knob can be added), but for Hydra's own settings and for groups outside the defaults list.
    """
    name = override.key_or_group
    if override.type is OverrideType.DEL or override.is_hydra_override() or name in added_groups:
        return text
    bare = text.lstrip("+")
    if any(name == opened or name.startswith(f"{opened}.") for opened in open_names):
        return f"++{bare}"
    return bare


def values_of(override: Override) -> list[Any]:
    """Every value that an override gives in a sweep; an interval gives its two ends, a glob none."""
    if override.value_type in (ValueType.ELEMENT, None):
        return [override.value()]
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep):
        return [Override._convert_value(item) for item in sweep.list]
    if isinstance(sweep, RangeSweep):
        return list(override.sweep_iterator())
    if isinstance(sweep, IntervalSweep):
        ends = (sweep.start, sweep.end)  # Hydra reads 4 as 4.0 here, which a knob of whole numbers would refuse
        return [int(end) if isinstance(end, float) and end.is_integer() else end for end in ends]
    return []


def first_job(override: Override, text: str) -> str | None:
    """An override as the first job of a sweep has it; None where that cannot be told (a glob)."""
    if not override.is_sweep_override():
        return text
    plus = text[: len(text) - len(text.lstrip("+"))]
    if override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
        value = next(iter(override.sweep_string_iterator()), None)
        return None if value is None else f"{plus}{override.key_or_group}={value}"
    values = values_of(override)
    return f"{plus}{override.key_or_group}={values[0]}" if values else None
