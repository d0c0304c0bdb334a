"""A configuration without a schema held against the schema: every unknown key and wrong value at once."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distft.config.other_words import meant
from distft.config.schema import Source
from distft.config.words import Knob, default_of, is_section, knobs, sections, wanted


def problems_of(cfg: DictConfig, schema: type) -> list[str]:
    """Everything in `cfg` that the schema has no place for."""
    values = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(values, dict)
    names = [knob.name for knob in knobs(schema)]
    return list(section_problems(values, schema, "", [*names, *sections(schema)]))


def section_problems(values: dict[Any, Any], section: type, prefix: str, names: list[str]) -> Iterator[str]:
    hints = typing.get_type_hints(section)
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            near = meant(name, names)
            beneath = [known for known in names if known.startswith(prefix) and known.count(".") == prefix.count(".")]
            yield f"Unknown key {name}." + (f" Did you mean {near}?" if near else f" There are: {', '.join(beneath)}.")
        elif is_section(hints[key]):
            if isinstance(value, dict):
                yield from section_problems(value, hints[key], f"{name}.", names)
            else:
                beneath = [known for known in names if known.startswith(f"{name}.")]
                yield f"{name}={value}: {name} is a section. Set one of {', '.join(beneath)}."
        else:
            field = fields[key]
            knob = Knob(name, hints[key], default_of(field), tuple(field.metadata.get("choices", ())), "")
            problem = value_problem(knob, value)
            if problem:
                yield problem


def value_problem(knob: Knob, value: Any) -> str | None:
    """Why `value` cannot be that knob's; None where it fits. Text with an interpolation is left to Hydra."""
    if isinstance(value, str) and "${" in value:
        return None
    if knob.name.endswith("data.sources") or knob.name == "sources":
        return sources_problem(knob, value)
    holder = dataclasses.make_dataclass("Holder", [("value", knob.type, dataclasses.field(default=None))])
    try:
        typed = OmegaConf.structured(holder(default_or_empty(knob)))
        typed.value = value
    except (OmegaConfBaseException, ValueError):
        return f"{knob.name}={value}: {wanted(knob.type)} is wanted."
    if typing.get_origin(knob.type) is tuple and len(value) != len(typing.get_args(knob.type)):
        return f"{knob.name}={value}: {wanted(knob.type)} is wanted."
    return None


def default_or_empty(knob: Knob) -> Any:
    return list(knob.default) if isinstance(knob.default, tuple) else knob.default


def sources_problem(knob: Knob, value: Any) -> str | None:
    """`data.sources`: a list of mappings, each in the schema of one source."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return f"{knob.name}={value}: a list of sources [{{path: a.jsonl, weight: 1}}, …] is wanted."
    names = [f"{knob.name}[].{inner.name}" for inner in knobs(Source)]
    problems = [problem for item in value for problem in section_problems(item, Source, f"{knob.name}[].", names)]
    return " ".join(problems) or None
