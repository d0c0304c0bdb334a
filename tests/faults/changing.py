"""Modules that are changed the moment they are imported, for processes that are started by others.

A folder with a `sitecustomize.py` on PYTHONPATH calls `change_on_import`; what it changes knows nothing of it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

Change = Callable[[Any], None]


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: dict[str, list[Change]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in self.changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for change in self.changes[name]:
                change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def change_on_import(chosen: Iterable[tuple[str, Change]]) -> None:
    """Each a module's name and what is done to it."""
    changes: dict[str, list[Change]] = {}
    for name, change in chosen:
        changes.setdefault(name, []).append(change)
    sys.meta_path.insert(0, Finder(changes))
