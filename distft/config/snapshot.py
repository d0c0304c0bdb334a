"""A run written down whole, read back, and reduced to a hash of what it computes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import xxhash
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distft.config.diagnose import problems_of
from distft.config.foreign import pairs_of
from distft.config.given import SURROUNDINGS, all_knobs, within
from distft.config.schema import Run
from distft.errors import Mistakes, UserMistake

GROUPS = ("model", "data", "tuning", "objective", "strategy", "optim", "schedule", "launch", "log")
SNAPSHOT_MARK = "# A distft run, whole."

NOT_COMPUTED = (
    *SURROUNDINGS,
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.background",
    "checkpoint.on_full",
    "eval.samples",
    "eval.max_new_tokens",
    "guard.stall_seconds",
    "verify",
)
"""Knobs, or sections of them, that do not decide what is computed."""


def is_snapshot(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as lines:
        return lines.readline().startswith(SNAPSHOT_MARK)


def with_tuples(section: Any) -> Any:
    """OmegaConf gives lists where the schema says tuple; equality and hashes want the schema's."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            with_tuples(value)
        elif isinstance(value, list) and str(field.type).startswith("tuple"):
            setattr(section, field.name, tuple(value))
    return section


def write_snapshot(run: Run, path: Path) -> None:
    """Write the whole run as a primary config that repeats it, in a new run folder.

    The groups are listed after the values, so that `strategy=fsdp` on the command line still chooses.
    """
    values = dataclasses.asdict(run)
    values["run"]["dir"] = None
    values["optim"]["betas"] = list(run.optim.betas)
    defaults = ["schema", "_self_", *({group: None} for group in GROUPS), {"experiment": None}]
    head = (
        f"{SNAPSHOT_MARK} Repeat it, in a new run folder:\n"
        "#   python train.py --config-dir <this folder> --config-name config [key=value …]\n"
    )
    body = [OmegaConf.to_yaml(OmegaConf.create(part)) for part in ({"defaults": defaults}, values)]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(head + "".join(body), encoding="utf-8")
    temporary.replace(path)


def read_snapshot(path: Path) -> Run:
    """The run of a snapshot, without Hydra.

    Raises:
        UserMistake: there is no such file, or it does not fit this version's schema.
    """
    try:
        values = OmegaConf.load(path)
        assert isinstance(values, DictConfig)
        values.pop("defaults", None)
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if any(key == "_target_" for key, _ in pairs_of(tree)):
            raise UserMistake(f"{path} has `_target_`, which names Python: configuration never does. Remove it.")
        problems = problems_of(values, Run)
        if problems:
            raise Mistakes([f"{path}: {problem}" for problem in problems])
        return with_tuples(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), values)))
    except FileNotFoundError:
        raise UserMistake(f"There is no snapshot {path}. A run folder holds it as config.yaml.") from None
    except OmegaConfBaseException as error:
        raise UserMistake(f"{path} is not the snapshot of a run: {error}") from None


def computed(run: Run) -> dict[str, Any]:
    """The knobs that decide what is computed, by dotted name; not where it runs, is logged or is started from."""
    values = dataclasses.asdict(run)
    names = [name for name in all_knobs() if not within(name, NOT_COMPUTED)]
    return {name: functools.reduce(lambda section, key: section[key], name.split("."), values) for name in names}


def hash_of(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())


def config_hash(run: Run) -> str:
    """XXH3-128 over `computed(run)`, as 32 hexadecimal digits."""
    return hash_of(computed(run))


def whole_hash(run: Run) -> str:
    """XXH3-128 over every knob: ranks that were started alike agree on it."""
    return hash_of(dataclasses.asdict(run))
