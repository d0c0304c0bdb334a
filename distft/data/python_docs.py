"""Questions about the Python standard library, answered by its own docstrings: real text on every machine.

Modules written in Python are read, not imported, so that nothing of theirs runs; those written in C have their
docstrings only at run time and are imported, except the few that do something when they are.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

LEFT_OUT = {
    "__future__", "antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "nis", "ossaudiodev",
    "pydoc_data", "readline", "test", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
LEFT_OUT_INSIDE = {"test", "tests", "idle_test", "__pycache__", "_distutils", "command"}
SHORTEST, LONGEST = 24, 1200  # characters of an answer

Fact = dict[str, str]


def rows_file(cache: Path) -> Path:
    """The file of all rows for the interpreter that runs, collected the first time."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    file = cache / "python_docs" / f"{sys.implementation.name}-{version}-{code}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".tmp-{os.getpid()}")
        unfinished.write_text("".join(json.dumps(fact) + "\n" for fact in collect()), encoding="utf-8")
        unfinished.replace(file)
    return file


def collect() -> Iterator[Fact]:
    """Every public thing of the standard library that has a docstring, in order of modules, then of definition."""
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in LEFT_OUT:
            continue
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            facts = _written_in_python(Path(spec.origin), name)
        else:
            facts = _written_in_c(name)
        for fact in facts:
            if fact["id"] not in seen:
                seen.add(fact["id"])
                yield fact


def _written_in_python(file: Path, name: str) -> Iterator[Fact]:
    """Facts of a module, and of those below it where it is a package."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _fact("module", name, name, ast.get_docstring(tree))
    yield from _definitions(tree.body, name)
    if file.name == "__init__.py":
        for below in sorted(file.parent.iterdir()):
            if below.stem.startswith("_") or below.stem in LEFT_OUT_INSIDE:
                continue
            if below.suffix == ".py":
                yield from _written_in_python(below, f"{name}.{below.stem}")
            elif (below / "__init__.py").exists():
                yield from _written_in_python(below / "__init__.py", f"{name}.{below.name}")


def _definitions(body: list[ast.stmt], owner: str, in_class: bool = False) -> Iterator[Fact]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            path = f"{owner}.{node.name}"
            yield from _fact("class", path, path, ast.get_docstring(node))
            yield from _definitions(node.body, path, in_class=True)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            path = f"{owner}.{node.name}"
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if "property" in decorators:
                yield from _fact("attribute", path, path, ast.get_docstring(node))
                continue
            arguments = ast.unparse(node.args)
            if in_class and "staticmethod" not in decorators:  # the call is written as the caller writes it
                arguments = arguments.partition(", ")[2]
            kind = "method" if in_class else "function"
            yield from _fact(kind, path, f"{path}({arguments})", ast.get_docstring(node))


def _written_in_c(name: str) -> Iterator[Fact]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
        except ImportError:
            return
    yield from _fact("module", name, name, inspect.getdoc(module))
    for member, value in _members(module):
        path = member if name == "builtins" else f"{name}.{member}"
        if inspect.isclass(value):
            yield from _fact("class", path, path, value.__doc__)
            for method, function in _members(value):
                if callable(function):
                    inner = f"{path}.{method}"
                    yield from _fact("method", inner, _call(inner, function), function.__doc__)
        elif callable(value):
            yield from _fact("function", path, _call(path, value), value.__doc__)


def _members(owner: ModuleType | type) -> Iterator[tuple[str, Any]]:
    """Public members in the order of their names: a dictionary's order could differ between builds."""
    for name in sorted(vars(owner)):
        value = getattr(owner, name, None)
        if not name.startswith("_") and type(value).__module__ != "_sitebuiltins":
            yield name, value


def _call(path: str, function: Any) -> str:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return f"{path}()"
    given = [parameter for name, parameter in signature.parameters.items() if name not in ("self", "type")]
    text = str(signature.replace(parameters=given, return_annotation=inspect.Signature.empty))
    return path + text.replace(", /", "").replace("(/)", "()")


def _fact(kind: str, path: str, call: str, doc: object) -> Iterator[Fact]:
    """A row where the docstring says something; a long one ends with a whole paragraph."""
    if not isinstance(doc, str):
        return
    answer = inspect.cleandoc(doc).strip()
    if len(answer) > LONGEST:
        answer = answer[: max(answer.rfind("\n\n", 0, LONGEST), 0)] or answer[: answer.rfind(" ", 0, LONGEST)]
    answer = answer.strip()
    if len(answer) < SHORTEST or not answer.translate({ord("\n"): None, ord("\t"): None}).isprintable():
        return
    question = {
        "module": f"What is the Python module `{call}` for?",
        "class": f"What is the Python class `{call}`?",
        "function": f"What does the Python function `{call}` do?",
        "method": f"What does the Python method `{call}` do?",
        "attribute": f"What is the Python attribute `{call}`?",
    }[kind]
    yield {"id": path, "question": question, "answer": answer}
