"""From a command line to a typed run, and from a run to its snapshot and back."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.conf import HydraConf
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from distft.config import command_line, sweep_words
from distft.config.command_line import CommandLine
from distft.config.describe import help_text
from distft.config.diagnose import problems_of, value_problem
from distft.config.foreign import refuse_code, refuse_settings
from distft.config.snapshot import (
    GROUPS,
    computed,
    config_hash,
    is_snapshot,
    read_snapshot,
    whole_hash,
    with_tuples,
    write_snapshot,
)
from distft.config.words import Knob, knobs, nearest
from distft.errors import Mistakes, UserMistake

SCHEMAS = {
    "train": "distft.config.schema:Run",
    "generate": "distft.config.schema.generate:Generate",
    "verify": "distft.config.schema.verify:Verify",
    "report": "distft.config.schema.report:ReportOn",
    "check": "distft.config.schema.check:CheckedRun",
    "doctor": "distft.config.schema.doctor:DoctoredRun",
}
SNAPSHOT = "snapshot"  # name in Hydra's config store of a snapshot whose groups are chosen anew


@dataclass(frozen=True)
class Composed:
    """What a command line says: the run (of a sweep: its first job), the user's overrides, the primary config."""

    run: Any  # Run, or the schema of another verb; None where only help or the like is wanted
    overrides: list[str]
    primary: str
    line: CommandLine
    hydra_argv: list[str]  # for Hydra's own main
    sweep_dir: str | None  # where the jobs of a sweep lie


def conf_dir() -> Path:
    """The shipped configuration: `conf/` of a checkout, or `distft/conf` of an installed package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserMistake(f"distft's configuration is missing beside {package}: install distft again.")


@functools.cache
def schema_of(verb: str) -> type:
    module, _, name = SCHEMAS[verb].partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def knobs_of(verb: str) -> dict[str, Knob]:
    """The knobs of a verb by their dotted names."""
    return {knob.name: knob for knob in knobs(schema_of(verb))}


def register(schema: Any) -> None:
    """Tell Hydra the schema, and to leave nothing behind but a sweep's folders."""
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    defaults = [
        {"output": "distft"},
        {"launcher": "basic"},
        {"sweeper": "basic"},
        {"help": "default"},
        {"hydra_help": "default"},
        {"hydra_logging": "none"},
        {"job_logging": "none"},
        {"callbacks": None},
        {"env": "default"},
    ]
    store.store(group="hydra", name="config", node=HydraConf(defaults=defaults, output_subdir=None), provider="distft")
    folders = {
        "run": {"dir": "."},
        "sweep": {"dir": "multirun/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "${hydra.job.num}"},
        "job": {"chdir": False, "name": "distft"},
    }
    sweep_words.register()
    store.store(group="hydra/output", name="distft", node=folders, package="hydra", provider="distft")


def groups_of(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The options of every config group in these folders."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            group = path.parent.relative_to(folder).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(path.stem)
    return {group: sorted(options) for group, options in groups.items()}


def help_of(composed: Composed, verb: str) -> str:
    """The text of `--help`."""
    line = composed.line
    groups = groups_of([conf_dir(), *([line.config_dir] if line.config_dir else [])])
    return help_text(verb, schema_of(verb), groups)


def compose(argv: Sequence[str], verb: str = "train") -> Composed:
    """Compose a command line (what follows the verb) into a typed run. Nothing is started, nothing is written.

    Raises:
        UserMistake, Mistakes: everything wrong with flags, keys, choices and types, told together.
    """
    names = knobs_of(verb)
    open_names = [name for name, knob in names.items() if knob.is_open]
    line = command_line.read(argv, verb, [*names, *GROUPS])
    folders = [conf_dir()]
    if line.config_dir is not None:
        refuse_code(line.config_dir)
        folders.append(line.config_dir)
    if line.flags.shell_completion:  # its words are not those of a run
        register(schema_of(verb))
        return Composed(None, line.overrides, line.config_name, line, line.hydra_argv(), None)
    groups = groups_of(folders)
    problems = group_problems(line, groups) + sweep_problems(line, names)
    added = set(groups) - {*GROUPS, "experiment"}
    line.hydra_overrides[:] = [
        command_line.rewritten(*pair, open_names, added) for pair in zip(line.overrides, line.parsed, strict=True)
    ]
    primary = primary_of(line, verb)
    if line.shows_only and not line.overrides:
        register(schema_of(verb))
        return Composed(None, [], line.config_name, line, line.hydra_argv(primary), None)
    jobs = [command_line.first_job(*pair) for pair in zip(line.parsed, line.hydra_overrides, strict=True)]
    first = [text for text in jobs if text is not None]
    if problems:
        # Choices that do not exist would hide what else is wrong.
        rest = [text for text in first if not is_group(text) and not text.startswith("~")]
        found = diagnose(line.config_dir, primary, rest, verb)
        raise Mistakes(list(dict.fromkeys([*problems, *found])))
    cfg = composed(line, primary, first, verb)
    sweep_dir = None
    hydra_argv = line.hydra_argv(primary)
    if line.sweep:
        sweep_dir = str(cfg.hydra.sweep.dir)
        quoted = sweep_dir.replace("\\", "\\\\").replace("'", "\\'")
        hydra_argv = [text for text in hydra_argv if not text.startswith("hydra.sweep.dir=")]
        hydra_argv.append(f"hydra.sweep.dir='{quoted}'")
    refuse_trust(line, cfg)
    return Composed(to_run(cfg), line.overrides, line.config_name, line, hydra_argv, sweep_dir)


def refuse_trust(line: CommandLine, cfg: DictConfig) -> None:
    """
    Raises:
        UserMistake: a file outside conf/ says that a model's own code is to be run; only who types may say that.
    """
    name = "model.trust_remote_code"
    if line.config_dir is None or not OmegaConf.select(cfg, name):
        return
    if not any(override.key_or_group == name for override in line.parsed):
        raise UserMistake(
            f"{name}=true comes from a file in {line.config_dir}. It runs code of the model: read that code, then add "
            f"{name}=true to the command line."
        )


def primary_of(line: CommandLine, verb: str) -> str:
    """The name of the primary config. A snapshot gives way in the groups that are chosen anew, wholly."""
    folders = [conf_dir(), *([line.config_dir] if line.config_dir else [])]
    if ".." in Path(line.config_name).parts or Path(line.config_name).is_absolute():
        raise UserMistake(f"--config-name {line.config_name}: a name is wanted; its folder goes into --config-dir.")
    found = [folder / f"{line.config_name}.yaml" for folder in folders]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        options = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        near = nearest(line.config_name, options)
        raise UserMistake(
            f"--config-name {line.config_name}: no such file in {' or '.join(str(folder) for folder in folders)}. "
            + (f"Did you mean {near}? " if near else "")
            + f"There are: {', '.join(options)}."
        )
    chosen = {override.key_or_group for override in line.parsed if override.key_or_group in GROUPS}
    if not chosen or not is_snapshot(path):
        return line.config_name
    values = OmegaConf.load(path)
    assert isinstance(values, DictConfig)
    ConfigStore.instance().store(name=SNAPSHOT, node={key: value for key, value in values.items() if key not in chosen})
    return SNAPSHOT


@contextlib.contextmanager
def hydra_over(config_dir: Path | None) -> Iterator[Hydra]:
    """Hydra's composer over conf/ and, behind it, the folder of `--config-dir`: the search path of its `main`."""
    GlobalHydra.instance().clear()
    setbase("1.3")
    path = create_config_search_path(str(conf_dir()))
    if config_dir is not None:
        path.prepend("command-line", f"file://{config_dir}", SearchPathQuery(provider="schema"))
    try:
        yield Hydra.create_main_hydra2("distft", path)
    finally:
        GlobalHydra.instance().clear()


def composed(line: CommandLine, primary: str, overrides: list[str], verb: str) -> DictConfig:
    """Hydra's composition, with what it refuses put into our words."""
    try:
        register(schema_of(verb))
        with hydra_over(line.config_dir) as hydra:
            cfg = hydra.compose_config(primary, overrides, RunMode.RUN, from_shell=False)
            if line.config_dir is not None:
                own = [o.input_line for o in line.parsed if o.is_hydra_override() and not o.is_sweep_override()]
                refuse_settings(cfg, hydra.compose_config(verb, own, RunMode.RUN, from_shell=False))
            to_run(cfg)  # resolves every interpolation, so that a broken one is told here
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        problems = diagnose(line.config_dir, primary, overrides, verb) or [in_our_words(error)]
    raise Mistakes(problems)


def diagnose(config_dir: Path | None, primary: str, overrides: list[str], verb: str) -> list[str]:
    """Compose once more without a schema and compare with it by ourselves, so that all problems come together."""
    forced = [text if text.startswith(("hydra", "~", "+")) or is_group(text) else f"++{text}" for text in overrides]
    try:
        register({})
        with hydra_over(config_dir) as hydra:
            cfg = hydra.compose_config(primary, forced, RunMode.RUN, from_shell=False)
        with open_dict(cfg):
            del cfg["hydra"]
        return problems_of(cfg, schema_of(verb))
    except (HydraException, OmegaConfBaseException, ValueError):
        return []
    finally:
        register(schema_of(verb))


def is_group(text: str) -> bool:
    key = text.lstrip("+").partition("=")[0].partition("@")[0]
    return (conf_dir() / key).is_dir()


def in_our_words(error: Exception) -> str:
    """Hydra's own message without its advice to add unknown keys."""
    causes = [str(part).strip() for part in (error, error.__cause__) if part is not None and str(part).strip()]
    text = "\n".join(causes).partition("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip() and "To append to your" not in line]
    return "The configuration cannot be composed: " + " ".join(lines)


def group_problems(line: CommandLine, groups: dict[str, list[str]]) -> list[str]:
    """Choices of a group that do not exist, and choices that are taken away."""
    problems = []
    for override in line.parsed:
        group = override.key_or_group
        if override.type is OverrideType.DEL:
            problems.append(f"~{group}: nothing can be taken out of a run. Choose another value instead.")
            continue
        if group not in groups:
            continue
        options = groups[group]
        for value in command_line.values_of(override):
            for word in value if isinstance(value, list) else [value]:
                if word is None or str(word) in options:
                    continue
                near = nearest(str(word), options)
                own = named(group, str(word), options)
                if near and not (own and ("/" in str(word) or "." in str(word))):
                    meant = f" Did you mean {group}={near}?"
                else:
                    meant = f" One of your own: {own}." if own else ""
                problems.append(f"{group}={word}: no such choice.{meant} Choices: {', '.join(options)}.")
    return problems


def named(group: str, word: str, options: list[str]) -> str | None:
    """How a model or data that is no choice of its group is named."""
    if group == "data":
        ending = Path(word).suffix.lstrip(".").replace("txt", "text")
        return f"data={ending if ending in options else 'hub'} data.path={word}"
    return f"model=hf model.path={word}" if group == "model" else None


def sweep_problems(line: CommandLine, names: dict[str, Knob]) -> list[str]:
    """Several values without -m; with it, each single value of a knob against its type."""
    problems = list(sweep_words.problems(line.parsed))
    for override, text in zip(line.parsed, line.overrides, strict=True):
        if not override.is_sweep_override():
            continue
        if not line.sweep:
            listed = f"[{text.partition('=')[2]}]"
            problems.append(f"`{text}` gives several values: add -m to run each of them, or write {listed} for a list.")
        elif override.key_or_group in names:
            knob = names[override.key_or_group]
            found = (value_problem(knob, value) for value in command_line.values_of(override))
            problems += [problem for problem in found if problem]
    return problems


def to_run(cfg: DictConfig) -> Any:
    """The typed object of a composed configuration."""
    plain = copy.deepcopy(cfg)
    with open_dict(plain):
        plain.pop("hydra", None)
    return with_tuples(OmegaConf.to_object(plain))


__all__ = [
    "Composed",
    "compose",
    "computed",
    "conf_dir",
    "config_hash",
    "nearest",
    "read_snapshot",
    "to_run",
    "whole_hash",
    "write_snapshot",
]
