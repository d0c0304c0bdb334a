"""What torch and transformers import without need: left out until something asks for it.

Decorators alone make transformers import torch's compiler and torch's optimizers import it at their first step;
transformers also imports DTensor, and with it sympy, for a sharding of its own that distft never uses. Together that
is a third of the time until a small run trains, and some 100 MB of every rank. Where scipy is installed, transformers
imports its optimizers too, for the losses of models that find objects in pictures.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
MASKS = "torch._dynamo._trace_wrapped_higher_order_op"  # of which transformers' masks import one class
SHARDING = "transformers.distributed"
OTHER_LOSSES = re.compile(r"transformers\.loss\.loss_(?!utils$)\w+")  # a language model's stands in loss_utils itself
marked: list[tuple[str, Any]] = []  # functions for the compiler to know once it is there, and what it is to know


def defer() -> None:
    """From now on leave them out, where they are not imported yet. Imports nothing itself."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(importlib.abc.MetaPathFinder):
    """Looks on when the modules above are first imported."""

    losses = True  # whether those of OTHER_LOSSES are left out

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == COMPILER:
            return importlib.util.spec_from_loader(name, StandInLoader(StandIn), is_package=True)
        if name == MASKS and isinstance(sys.modules.get(COMPILER), StandIn):
            return importlib.util.spec_from_loader(name, StandInLoader(Part))
        if name.startswith(f"{COMPILER}.") and isinstance(sys.modules.get(COMPILER), StandIn):
            wake()  # a part of it is asked for
            if name in sys.modules:
                return importlib.util.spec_from_loader(name, ThereAlready(sys.modules[name]))
        if name == SHARDING:
            without_sharding()
        if OTHER_LOSSES.fullmatch(name) and self.losses:
            return importlib.util.spec_from_loader(name, StandInLoader(Losses))
        return None


def without_sharding() -> None:
    """Let transformers find no torch.distributed: it asks once, and keeps the answer. distft shards by itself."""
    import torch.distributed
    from transformers.utils import is_torch_distributed_available

    asked, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        is_torch_distributed_available()
    finally:
        torch.distributed.is_available = asked


def wake() -> ModuleType:
    """Import torch's compiler itself in the place of its stand-in."""
    if not isinstance(sys.modules.get(COMPILER), StandIn):
        return importlib.import_module(COMPILER)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    parent = sys.modules["torch"]
    del sys.modules[COMPILER]
    sys.modules.pop(MASKS, None)
    vars(parent).pop("_dynamo", None)
    real = importlib.import_module(COMPILER)
    sys.meta_path.insert(0, Finder())
    while marked:
        name, fn = marked.pop(0)
        getattr(real, name)(fn)
    return real


class Known:
    """Part of the compiler, of which torch asks a few things when a process group or an engine is made."""

    def __init__(self, name: str, **known: Callable[[], Any]) -> None:
        self.name, self.known = name, known

    def __getattr__(self, name: str) -> Any:
        return self.known[name] if name in self.known else getattr(getattr(wake(), self.name), name)


class StandIn(ModuleType):
    """`torch._dynamo` as long as nothing is compiled: what decorators and optimizers ask of it, done without it.

    Everything else is answered by the compiler itself, which is imported for that.
    """

    utils = Known("utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # the default, with nothing compiled
    trace_rules = Known("trace_rules", clear_lru_cache=lambda: None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(name)
        return getattr(wake(), name)

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """`fn` is not to be compiled: settled at its first call after the compiler was imported."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **options)
        if not callable(fn) or isinstance(fn, type) or not hasattr(fn, "__code__"):
            return wake().disable(fn, recursive, **options)
        return not_compiled(fn, recursive, options)

    def assume_constant_result(self, fn: Any) -> Any:
        marked.append(("assume_constant_result", fn))
        return fn

    def allow_in_graph(self, fn: Any) -> Any:
        marked.append(("allow_in_graph", fn))
        return fn

    def graph_break(self, *arguments: Any, **options: Any) -> None:
        if not isinstance(sys.modules.get(COMPILER), StandIn):
            wake().graph_break(*arguments, **options)


class Part(ModuleType):
    """A module of the compiler of which something is imported, but not called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments: Any, **options: Any) -> Any:
            wake()
            return getattr(importlib.import_module(self.__name__), name)(*arguments, **options)

        return called


class Losses(ModuleType):
    """A module of losses of which something is imported, but not called. One class may extend another's: with the
    first that is called all of these modules become whole."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments: Any, **options: Any) -> Any:
            Finder.losses = False
            for other in [other for other, module in sys.modules.items() if isinstance(module, Losses)]:
                del sys.modules[other]
            return getattr(importlib.import_module(self.__name__), name)(*arguments, **options)

        return called


def not_compiled(fn: Callable[..., Any], recursive: bool, options: dict[str, Any]) -> Callable[..., Any]:
    settled: Callable[..., Any] | None = None

    @functools.wraps(fn)
    def inner(*arguments: Any, **named: Any) -> Any:
        nonlocal settled
        if settled is None:
            if isinstance(sys.modules.get(COMPILER), StandIn):
                return fn(*arguments, **named)
            settled = wake().disable(fn, recursive, **options)
        assert settled is not None
        return settled(*arguments, **named)

    return inner


class StandInLoader(importlib.abc.Loader):
    def __init__(self, kind: type[ModuleType]) -> None:
        self.kind = kind

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.kind(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class ThereAlready(importlib.abc.Loader):
    """Gives the import system a module that was imported while it was looking for it."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
