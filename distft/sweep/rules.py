"""The rules of a sweep: what is wrong with it is told before its first job, and what follows from its words."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from distft.config.check import check
from distft.config.command_line import values_of
from distft.config.given import ignored
from distft.config.load import Composed, compose, hydra_over, knobs_of
from distft.config.schema import Run
from distft.errors import Mistakes, UserMistake
from distft.launch.start import quoted
from distft.sweep import lease
from distft.sweep.space import Real, size, split
from distft.sweep.study import STUDY, Search, held, optuna_module
from distft.sweep.sweeper import base_of

SEARCH = ("sampler", "trials", "seed", "pruner", "prune_after_trials", "prune_after_steps")


def choice_of(composed: Composed, group: str) -> str:
    """What the command line chooses of a group of Hydra's own."""
    chosen = [override.value() for override in composed.line.parsed if override.key_or_group == group]
    return str(chosen[-1]) if chosen else "basic"


def problems(composed: Composed) -> list[str]:
    """Everything wrong with the words of a sweep, or with words of a sweep where there is none."""
    rules = (sweeping, together, searching) if composed.line.sweep else (single,)
    found = [problem for rule in rules for problem in rule(composed)]
    if found or choice_of(composed, "hydra/sweeper") != "optuna":
        return found
    return list(going_on(composed))


def settled(composed: Composed) -> Composed:
    """The launcher that `sweep.jobs` wants, with the words that its jobs need."""
    line = composed.line
    if not line.sweep or choice_of(composed, "hydra/launcher") not in ("basic", "side_by_side"):
        return composed
    if composed.run.sweep.jobs == 1 and choice_of(composed, "hydra/launcher") == "basic":
        return composed
    flags = [f"--config-name={line.config_name}", *([f"--config-dir={line.config_dir}"] if line.config_dir else [])]
    told = ",".join(quoted(flag) for flag in flags)
    return dataclasses.replace(
        composed,
        hydra_argv=[*composed.hydra_argv, "hydra/launcher=side_by_side", f"hydra.launcher.flags=[{told}]"],
    )


def single(composed: Composed) -> Iterator[str]:
    """A run by itself. An experiment file may hold a search, whose experiment can still be run once."""
    for override, text in zip(composed.line.parsed, composed.line.overrides, strict=True):
        name = override.key_or_group
        if name.partition(".")[0] == "sweep" or name in ("hydra/sweeper", "hydra/launcher"):
            yield f"`{text}` has no effect on a single run. Add -m for a sweep, or drop it."


def sweeping(composed: Composed) -> Iterator[str]:
    run, line = composed.run, composed.line
    if any(override.key_or_group == "run.dir" and not override.is_sweep_override() for override in line.parsed):
        yield "run.dir is one folder, but each job of a sweep needs its own. Drop it, or set hydra.sweep.dir."
    for name in run.sweep.space:
        if name.partition(".")[0] == "sweep" or name.startswith("hydra"):
            yield f"sweep.space: {name} is no knob of a run."
    for override, text in zip(line.parsed, line.overrides, strict=True):
        name = override.key_or_group
        if override.is_sweep_override() and name.partition(".")[0] in ("sweep", "hydra"):
            yield f"`{text}` gives several values, but it decides about the sweep itself. Give one."
    if choice_of(composed, "hydra/sweeper") == "optuna":
        return
    yield from ignored(run, [f"sweep.{name}" for name in SEARCH], "without hydra/sweeper=optuna")
    for override, text in zip(line.parsed, line.overrides, strict=True):
        if override.is_sweep_override() and isinstance(override.value(), IntervalSweep):
            yield f"`{text}`: there is no end of values in an interval. Add hydra/sweeper=optuna, or list some."


def together(composed: Composed) -> Iterator[str]:
    """`sweep.jobs`."""
    run, launcher = composed.run, choice_of(composed, "hydra/launcher")
    jobs = run.sweep.jobs
    if jobs != "auto" and not (isinstance(jobs, int) and jobs >= 1):
        return  # no number of its range, which is told already
    if launcher not in ("basic", "side_by_side"):
        if jobs == "auto":
            yield f"sweep.jobs=auto counts this machine's devices; with hydra/launcher={launcher} give a number."
        elif jobs != 1 and choice_of(composed, "hydra/sweeper") != "optuna":
            yield f"sweep.jobs={jobs} has no effect with hydra/launcher={launcher}, which is given all jobs. Drop it."
        return
    if jobs == 1:
        return
    if run.launch.target != "local":
        yield f"sweep.jobs={jobs} divides this machine's devices: it needs launch=local, not {run.launch.target}."
    if any(o.is_sweep_override() and o.key_or_group in ("launch", "launch.ranks") for o in composed.line.parsed):
        yield f"sweep.jobs={jobs} needs jobs of one size: launch.ranks has several values. Give one, or sweep.jobs=1."
        return
    try:
        lease.here(jobs, run.launch.ranks)
    except UserMistake as mistake:
        yield str(mistake)


def searching(composed: Composed) -> Iterator[str]:
    """`hydra/sweeper=optuna`."""
    if choice_of(composed, "hydra/sweeper") != "optuna":
        return
    run: Run = composed.run
    parsed = parsed_of(composed)
    swept = [override for override in parsed if override.is_sweep_override()]
    try:
        dimensions, _ = split(parsed, knobs_of("train"))
    except Mistakes as mistakes:
        yield from mistakes.problems
        return
    if not dimensions:
        yield (
            "hydra/sweeper=optuna has nothing to search. Give a knob several values, such as "
            "'optim.lr=tag(log, interval(1e-5, 1e-3))', or name an experiment with sweep.space."
        )
        return
    for override in swept:
        if override.key_or_group in ("checkpoint.best", "checkpoint.mode", "resume"):
            yield f"{override.key_or_group} decides what is compared: it cannot be searched over. Give one value."
            return
    yield from outside(run, swept)
    sweep, endless = run.sweep, [dimension.name for dimension in dimensions if isinstance(dimension, Real)]
    combinations = size(dimensions)
    if sweep.sampler == "grid" and endless:
        yield f"sweep.sampler=grid needs values to count: {', '.join(endless)}=interval(…) has none. List them."
    if sweep.trials and combinations and sweep.trials > combinations:
        yield f"sweep.trials={sweep.trials} is more than the search space has combinations: {combinations}. Lower it."
    if run.resume != "auto":
        yield f"resume={run.resume}: a trial is a run of its own, and goes on by itself. Leave it at auto."
    if not run.data.eval_fraction and not run.data.eval_path:
        yield "hydra/sweeper=optuna compares evaluations, and this run has none. Set data.eval_fraction or eval_path."
    yield from pruning(run)


def pruning(run: Run) -> Iterator[str]:
    pruner = run.sweep.pruner
    if pruner == "none":
        why = "with sweep.pruner=none: no trial is pruned"
        yield from ignored(run, ["sweep.prune_after_trials", "sweep.prune_after_steps"], why)
        return
    if run.eval.every == 0:
        yield f"sweep.pruner={pruner} compares evaluations on the way, and eval.every=0 makes none. Set eval.every."
    if pruner != "median":
        yield from ignored(run, ["sweep.prune_after_trials"], f"with sweep.pruner={pruner} (median waits for trials)")


def parsed_of(composed: Composed) -> list[Override]:
    """The overrides, with what the choices of a glob need."""
    with hydra_over(composed.line.config_dir) as hydra:
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        return list(parser.parse_overrides(composed.line.overrides))


def outside(run: Run, swept: list[Override]) -> Iterator[str]:
    """What the rules say to each value of a knob, and to both ends of an interval, beside the others' first values."""
    told: dict[str, None] = {}
    for override in swept:
        name = override.key_or_group
        if name not in knobs_of("train"):
            continue  # a group, whose choices are known to exist
        for value in values_of(override):
            other = copy.deepcopy(run)
            put(other, name, value)
            told |= dict.fromkeys(check(other))
    yield from told


def put(run: Run, name: str, value: Any) -> None:
    """Give a knob a value of its type."""
    *sections, last = name.split(".")
    section = run
    for part in sections:
        section = getattr(section, part)
    before = getattr(section, last)
    if isinstance(before, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(before, int) and not isinstance(before, bool) and isinstance(value, float) and value == int(value):
        value = int(value)
    setattr(section, last, tuple(value) if isinstance(before, tuple) and isinstance(value, list) else value)


def going_on(composed: Composed) -> Iterator[str]:
    """Whether the study that lies in the sweep's folder already is this search."""
    optuna_module()
    folder = Path(composed.sweep_dir or "").absolute()
    if not (folder / STUDY).is_file():
        return
    dimensions, _ = split(parsed_of(composed), knobs_of("train"))
    run = compose(fixed_words(composed)).run
    with held(folder):
        try:
            Search(folder, run.sweep, dimensions, base_of(run, dimensions), run.checkpoint.mode)
        except Mistakes as mistakes:
            yield from mistakes.problems


def fixed_words(composed: Composed) -> list[str]:
    """The command line without the knobs that are searched over and without Hydra's own."""
    line = composed.line
    flags = [f"--config-name={line.config_name}", *([f"--config-dir={line.config_dir}"] if line.config_dir else [])]
    pairs = zip(line.parsed, line.overrides, strict=True)
    return [*flags, *(text for o, text in pairs if not o.is_sweep_override() and not o.is_hydra_override())]
