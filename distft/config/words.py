"""The words of the schema: every knob by its dotted name, and the nearest word to one that is wrong."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Knob:
    """One setting: a leaf of the schema."""

    name: str  # dotted, as on the command line
    type: Any  # the annotation, resolved
    default: Any
    choices: tuple[Any, ...]  # empty: any value of the type
    doc: str

    @property
    def is_open(self) -> bool:
        """Whether keys of the user's own may stand below it."""
        return typing.get_origin(self.type) is dict


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field, made afresh."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def docs_of(section: type) -> dict[str, str]:
    """The text beneath each field of a dataclass and of those it extends, on one line."""
    docs: dict[str, str] = {}
    for base in section.__bases__:
        docs |= docs_of(base) if is_section(base) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = after.value.value if is_text else ""  # type: ignore[union-attr]
            docs[statement.target.id] = " ".join(str(text).split())
    return docs


def knobs(section: type, prefix: str = "", docs: bool = False) -> Iterator[Knob]:
    """All knobs of a schema class, depth first. `docs`: also read their texts, from the source (slower)."""
    hints = typing.get_type_hints(section)
    texts = docs_of(section) if docs else {}
    for field in dataclasses.fields(section):
        name, annotation = prefix + field.name, hints[field.name]
        if is_section(annotation):
            yield from knobs(annotation, f"{name}.", docs)
        else:
            choices = tuple(field.metadata.get("choices", ()))
            yield Knob(name, annotation, default_of(field), choices, texts.get(field.name, ""))


def sections(section: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the schema's inner nodes."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if is_section(hints[field.name]):
            yield prefix + field.name
            yield from sections(hints[field.name], f"{prefix}{field.name}.")


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that was probably meant, or None. A dotted name whose last part alone fits is found too."""
    words = list(words)
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    if not found:
        last = word.rpartition(".")[2]
        ends = [name for name in words if name.rpartition(".")[2] == last]
        found = ends or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return found[0] if found else None


def unlisted(knob: str, given: Iterable[str], known: Sequence[str], fault: str) -> Iterator[str]:
    """A sentence for each name given to a knob that takes some of `known`. `fault`: what such a name is, as in `{name}
    {fault}`."""
    for name in given:
        if name not in known:
            near = nearest(name, known)
            meant = f" Did you mean {near}?" if near else ""
            yield f"{knob}: {name} {fault}.{meant} There are: {', '.join(known)}."


def wanted(annotation: Any) -> str:
    """A type in the user's words."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        text = " or ".join(wanted(part) for part in parts if part is not type(None))
        return f"{text} or null" if type(None) in parts else text
    origin = typing.get_origin(annotation) or annotation
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list: "a list [a,b]",
        tuple: "a list of two numbers [a,b]",
        dict: "a mapping {key: value}",
    }
    return words.get(origin, str(origin))
