"""What a configuration file from elsewhere may not contain.

Hydra imports and calls whatever `_target_` names below its own `hydra` node (callbacks, launchers, loggers), so a
folder given by `--config-dir` could run code. Files there choose values; they never name Python.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

from distft.errors import Mistakes, UserMistake

PACKAGE_HEADER = re.compile(r"^\s*#\s*@package\b.*hydra", re.MULTILINE)


def nodes_of(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node of a YAML document once (aliases make it a graph); nothing is constructed."""
    seen: set[int] = set()
    waiting = [root] if root is not None else []
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def pairs_of(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """(key, value) of every mapping with a plain key, at any depth."""
    for node in nodes_of(root):
        if isinstance(node, yaml.MappingNode):
            yield from ((key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))


def objections(text: str) -> list[str]:
    """What in the text of one YAML file is refused."""
    # Only a backslash in a quoted string could hide one of the two words from this quick look.
    if not any(word in text for word in ("hydra", "_target_", "defaults", "\\")):
        return []
    found = []
    if PACKAGE_HEADER.search(text):
        found.append("a `@package hydra` header")
    try:
        pairs = list(pairs_of(yaml.compose(text, Loader=yaml.SafeLoader)))
    except yaml.YAMLError:
        return [*found, "text that is not YAML"]
    words = [node.value for key, value in pairs if key == "defaults" for node in nodes_of(value)]
    if any(key == "_target_" for key, _ in pairs):
        found.append("`_target_`")
    # At any depth: a merge key (`<<`) could lift a nested mapping to the top.
    if any(re.match(r"hydra\b", key) for key, _ in pairs):
        found.append("a `hydra` key")
    if any(isinstance(word, str) and "hydra" in word for word in words):
        found.append("a `hydra` entry in its defaults list")
    if any(isinstance(word, str) and (".." in word or "//" in word) for word in words):
        found.append("an entry in its defaults list that leaves the folder")
    return found


def yaml_files(folder: Path) -> Iterator[Path]:
    """The files that Hydra could read below a folder: it follows links to folders, so we do, each once."""
    seen: set[Path] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in sorted(names) if name.endswith((".yaml", ".yml")))


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Hydra's node without what Hydra itself fills in."""
    node = cast("dict[str, Any]", OmegaConf.to_container(cfg.hydra, resolve=False))
    job = {name: node["job"].get(name) for name in ("chdir", "env_set", "env_copy", "config")}
    return {name: value for name, value in node.items() if name not in ("job", "runtime", "overrides")} | {"job": job}


def refuse_settings(theirs: DictConfig, ours: DictConfig) -> None:
    """Compare Hydra's own node of a composition with that of conf/ alone: whatever a file did, it did not touch it.

    Raises:
        UserMistake: a setting of Hydra comes from a file outside conf/.
    """
    nodes = [settings_of(cfg) for cfg in (theirs, ours)]
    changed = [f"hydra.{name}" for name in nodes[0] if nodes[0][name] != nodes[1].get(name)]
    if changed:
        raise UserMistake(
            f"{', '.join(changed)} would be set by a file outside conf/, which could run code. Give settings of Hydra "
            "itself on the command line."
        )


def refuse_code(folder: Path) -> None:
    """Look through every YAML file below `folder`, which is about to join Hydra's search path.

    Raises:
        Mistakes: a file carries `_target_` or a setting of Hydra itself.
    """
    problems = []
    for path in yaml_files(folder):
        found = objections(path.read_text(encoding="utf-8", errors="replace"))
        if "hydra" in path.relative_to(folder).parts[:-1]:
            found.append("a place in a group `hydra`")
        problems += [
            f"{path} has {what}, which could run code: a configuration file from outside conf/ may only choose values "
            "of distft's own knobs. Remove it, or give settings of Hydra itself on the command line."
            for what in found
        ]
    if problems:
        raise Mistakes(problems)
