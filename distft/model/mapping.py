"""A model folder's tensors under the names that the model gives its parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distft.errors import UserMistake
from distft.weights.store import FolderWeights, Overlay, Renamed, Weights, num_elements

Shapes = dict[str, tuple[int, ...]]
COMPARED_AT_A_TIME = 16 * 1024**2  # values


@dataclass
class Group:
    """Stored tensors that transformers turns into one or more parameters, such as experts stacked into one."""

    converter: Any
    first: str  # the name transformers files the group under
    sources: list[tuple[str, str]] = field(default_factory=list)  # (stored name, the pattern it matched)


class Converted:
    """Parameters that transformers makes out of stored tensors, one group in memory at a time."""

    def __init__(self, stored: Weights, model: Any, groups: dict[str, Group], shapes: Shapes) -> None:
        self.stored, self.model, self.groups, self.shapes = stored, model, groups, shapes
        self._group: Group | None = None
        self._tensors: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        return list(self.groups)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self.groups[name].sources[0][0])

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        flat = self._converted(self.groups[name])[name].reshape(-1)
        return flat[start : flat.numel() if length is None else start + length]

    def _converted(self, group: Group) -> dict[str, Tensor]:
        if self._group is not group:
            self._tensors = {}  # the last group goes before the next one comes
            converter = copy.deepcopy(group.converter)
            for name, pattern in group.sources:
                converter.add_tensor(group.first, name, pattern, self.stored.read(name).view(self.stored.shape(name)))
            made = converter.convert(group.first, model=self.model, config=self.model.config)
            self._tensors = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
            self._group = group
        return self._tensors


def open_weights(path: Path, model: nn.Module) -> Weights:
    """The folder's weights under the names of `model.named_parameters()` and its persistent buffers, read lazily.

    Names and shapes that differ are brought in line as transformers does when it loads the folder: renamed, prefixed,
    or computed from several stored tensors (`transformers.conversion_mapping`). `model` may lie on meta and may be
    sharded; it is not changed.

    Raises:
        UserMistake: the folder lacks a weight of this architecture, or holds one of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    folder = FolderWeights(path)
    shapes = shapes_of(model)
    wanted = dict.fromkeys([*shapes, *tied_names(model)], True)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    stored_name: dict[str, str] = {}
    groups: dict[str, Group] = {}
    for name in sorted(folder.names(), key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
        if renamed not in wanted:
            continue
        if pattern is None:
            stored_name[renamed] = name
        else:
            group = groups.setdefault(renamed, Group(by_pattern[pattern], renamed))
            group.sources.append((name, pattern))
    follow_ties(model, folder, stored_name, shapes)
    weights: Weights = Renamed(folder, {name: stored_name[name] for name in shapes if name in stored_name})
    if groups:
        weights = Overlay(weights, Converted(folder, model, targets_of(groups, shapes), shapes))
    check_complete(path, weights, model, shapes)
    return weights


def shapes_of(model: nn.Module) -> Shapes:
    """Whole shapes of parameters and persistent buffers by name, also where an engine has sharded them."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{key}" if prefix else key] = buffer
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}


def tied_names(model: nn.Module) -> list[str]:
    """All names that share a parameter with another name."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return [*pairs, *pairs.values()]


def follow_ties(model: nn.Module, folder: Weights, stored_name: dict[str, str], shapes: Shapes) -> None:
    """Let a tied parameter's name lead to whichever of its names the folder stores.

    Raises:
        UserMistake: the folder stores both, and they differ.
    """
    alike: dict[str, set[str]] = defaultdict(set)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        alike[source] |= {source, target}
    for names in alike.values():
        stored = sorted(name for name in names if name in stored_name)
        for other in stored[1:]:
            if not same(folder, stored_name[stored[0]], stored_name[other]):
                raise UserMistake(
                    f"{model.name_or_path}: its configuration ties {stored[0]} to {other}, but the folder stores two "
                    'different tensors for them. Set "tie_word_embeddings": false in its config.json.'
                )
        for name in names & set(shapes):
            if stored:
                stored_name.setdefault(name, stored_name[stored[0]])


def same(weights: Weights, one: str, other: str) -> bool:
    """Whether two stored tensors are equal, a piece at a time."""
    if weights.shape(one) != weights.shape(other):
        return False
    size = num_elements(weights.shape(one))
    for start in range(0, size, COMPARED_AT_A_TIME):
        length = min(COMPARED_AT_A_TIME, size - start)
        if not torch.equal(weights.read(one, start, length), weights.read(other, start, length)):
            return False
    return True


def targets_of(groups: dict[str, Group], shapes: Shapes) -> dict[str, Group]:
    """The group that makes each parameter: a converter with several target patterns makes several."""
    made: dict[str, Group] = {}
    for first, group in groups.items():
        patterns = group.converter.target_patterns
        names = [first.replace(patterns[0], pattern) for pattern in patterns]
        made |= {name: group for name in names if name in shapes}
    return made


def check_complete(path: Path, weights: Weights, model: nn.Module, shapes: Shapes) -> None:
    present = set(weights.names())
    if missing := [name for name in shapes if name not in present]:
        raise UserMistake(
            f"model.path={path} lacks {len(missing)} of the {len(shapes)} weights of {type(model).__name__}, the first "
            f"{missing[0]}: its config.json and its weights do not belong together, or it holds another kind of model."
        )
    for name, shape in shapes.items():
        if weights.shape(name) != shape:
            raise UserMistake(
                f"model.path={path}: {name} is stored as {list(weights.shape(name))}, but its config.json says "
                f"{list(shape)}: the two do not belong together."
            )
