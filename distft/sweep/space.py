"""The search space of a sweep: what each override of several values means to a sampler. Pure."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from distft.config.words import Knob
from distft.errors import Mistakes

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = str | int | float


@dataclass(frozen=True)
class Choice:
    """One of some words, each as it stands on the command line."""

    name: str
    words: tuple[str, ...]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.words)

    def grid(self) -> tuple[Value, ...]:
        return self.words


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, both included, in steps."""

    name: str
    low: int
    high: int
    step: int = 1
    log: bool = False

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def grid(self) -> tuple[Value, ...]:
        return tuple(range(self.low, self.high + 1, self.step))


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`."""

    name: str
    low: float
    high: float
    log: bool = False

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def grid(self) -> tuple[Value, ...] | None:
        return None


Dimension = Choice | Whole | Real


def word_of(dimension: Dimension, value: Value) -> str:
    """An override that gives the knob this value."""
    return f"{dimension.name}={value if isinstance(value, str) else repr(value)}"


def split(overrides: Sequence[Override], knobs: Mapping[str, Knob]) -> tuple[list[Dimension], list[str]]:
    """The dimensions of a command line, and its other overrides as they were given.

    `overrides`: parsed by Hydra, with a config loader where one of them is a glob. Of two for one knob the last counts.

    Raises:
        Mistakes: values that a sampler cannot draw from.
    """
    last = {override.key_or_group: override for override in overrides if not override.is_hydra_override()}
    dimensions, fixed, problems = [], [], []
    for name, override in last.items():
        if not override.is_sweep_override():
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
            continue
        try:
            dimensions.append(dimension_of(override, knobs.get(name)))
        except ValueError as error:
            problems.append(f"`{override.input_line}`: {error}")
    if problems:
        raise Mistakes(problems)
    return dimensions, fixed


def dimension_of(override: Override, knob: Knob | None) -> Dimension:
    """What a sampler draws for one knob.

    Whole numbers between the ends of an interval are drawn for a knob that takes only whole ones, and where the ends
    are cast: int(interval(1, 9)).

    Raises:
        ValueError: nothing can be drawn.
    """
    name, sweep = override.get_key_element(), override.value()
    tags = set(getattr(sweep, "tags", ()))
    if tags - {"log"}:
        raise ValueError(f"the tag {', '.join(sorted(tags - {'log'}))} says nothing here. Only tag(log, …) does.")
    log = "log" in tags
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        low, high = sweep.start, sweep.end
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"an interval goes from a lower to a higher number, such as interval({high}, {low}).")
        if log and low <= 0:
            raise ValueError("a logarithmic interval begins above 0.")
        if (type(low) is int and type(high) is int) or takes_whole_numbers(knob):
            if low != int(low) or high != int(high):
                raise ValueError(f"{override.key_or_group} takes whole numbers.")
            return Whole(name, int(low), int(high), log=log)
        return Real(name, float(low), float(high), log)
    if log:
        raise ValueError("only an interval can be logarithmic: tag(log, interval(1e-5, 1e-3)).")
    words = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not words:
        raise ValueError("it gives no value.")
    if isinstance(sweep, RangeSweep) and not sweep.shuffle and len(words) > 1:
        values = list(sweep.range())
        if all(isinstance(value, int) for value in values):
            step = int(values[1]) - int(values[0])
            return Whole(name, int(min(values)), int(max(values)), abs(step))
    return Choice(name, words)


def takes_whole_numbers(knob: Knob | None) -> bool:
    if knob is None:
        return False
    types = typing.get_args(knob.type) or (knob.type,)
    return int in types and float not in types


def size(dimensions: Sequence[Dimension]) -> int | None:
    """Combinations of values; None where there are infinitely many."""
    total = 1
    for dimension in dimensions:
        grid = dimension.grid()
        if grid is None:
            return None
        total *= len(grid)
    return total


def told(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """The space in JSON's types, to be compared with another."""
    return {dimension.name: [type(dimension).__name__, *map(str, vars(dimension).values())] for dimension in dimensions}
