"""A row of a source, and the document that it becomes: a conversation or raw text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import xxhash
from jinja2.sandbox import ImmutableSandboxedEnvironment

COLUMN_TEMPLATES = ("system", "user", "assistant", "prompt", "completion", "text")  # keys of data.columns: templates
COLUMN_NAMES = ("messages", "id")  # keys of data.columns that name a column
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
SHAPES = (  # required columns, in the order in which they are recognised
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("text",),
)


SAME = json.JSONEncoder(ensure_ascii=True, sort_keys=True, default=str)  # one text for equal values


class Row(NamedTuple):
    """One record as it was read."""

    number: int  # line of a text format, else position in the file from 1
    id: str
    value: dict[str, Any]
    file: str = ""


class BadRow(NamedTuple):
    """A record that cannot be used. `reason` is the same text for the same kind of fault, so that it can be counted."""

    number: int
    reason: str
    detail: str = ""
    id: str = ""
    file: str = ""


class Unfit(Exception):
    """A row that cannot become a document or cannot be trained on."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Document:
    """What one row says: messages of a chat (`role`, `content`, …), or `text` where there are none."""

    messages: tuple[dict[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()  # by message: an assistant turn that carries loss
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""

    def content_hash(self) -> int:
        """64 bits of the content alone: equal rows get equal numbers, on every machine and in every order of rows."""
        return xxhash.xxh3_64_intdigest(SAME.encode([self.messages, self.tools, self.text]).encode())

    def plain(self) -> str:
        """The words alone, with no template: contents joined by newlines."""
        return self.text or "\n".join(str(message.get("content") or "") for message in self.messages)


def trainable(document: Document, objective: str) -> Document:
    """The same document.

    Raises:
        Unfit: nothing in it can be trained, whatever template and tokenizer make of it.
    """
    if objective == "sft" and not any(document.trained):
        raise Unfit("no assistant turn")
    return document


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: not with half of a surrogate pair, as JSON's escapes may give."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def num_chars(value: Any) -> int:
    """Characters of all texts in a record."""
    total, left = 0, [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, Mapping):
            left += part.values()
        elif isinstance(part, (list, tuple)):
            left += part
    return total


class NotText(Exception):
    """A template put out a value that is no text."""


def _only_text(value: Any) -> Any:
    """Refuse what Jinja would print as Python source: None, lists and objects."""
    if value is None:
        raise NotText("a column is null")
    if isinstance(value, (list, tuple)):
        raise NotText("a column is a list; join it in the template: {{ column | join('\\n') }}")
    if isinstance(value, (Mapping, bytes)):
        raise NotText(f"a column holds {type(value).__name__}, not text")
    return value


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=_only_text, keep_trailing_newline=True
    )


@dataclass(frozen=True)
class Columns:
    """How the columns of a source make a document: by templates, or recognised by their names.

    Raises:
        jinja2.TemplateSyntaxError: from the constructor, where a template cannot be read.
    """

    templates: tuple[tuple[str, str], ...] = ()  # (role, template), or ("messages" | "id", name of a column)
    compiled: dict[str, jinja2.Template] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for role, template in self.templates:
            if role in COLUMN_TEMPLATES:
                self.compiled[role] = _environment().from_string(template)

    def __reduce__(self) -> tuple[Any, ...]:
        return Columns, (self.templates,)

    def variables(self) -> set[str]:
        """Columns that the templates name."""
        named = {column for role, column in self.templates if role in COLUMN_NAMES}
        for role, template in self.templates:
            if role in COLUMN_TEMPLATES:
                named |= jinja2.meta.find_undeclared_variables(_environment().parse(template))
        return named

    def id_of(self, value: Mapping[str, Any]) -> Any:
        return value.get(dict(self.templates).get("id", "id"))

    def document(self, value: Mapping[str, Any]) -> Document:
        """Make the document of one record.

        Raises:
            Unfit: a column is missing, empty or of the wrong type.
        """
        templates = {role: template for role, template in self.templates if role != "id"}
        if "messages" in templates:
            return _chat(_need(value, templates["messages"]), value)
        if templates:
            return _flat({role: self._render(role, value) for role in templates})
        shape = shape_of(value)
        if shape is None:
            raise Unfit("unknown columns", ", ".join(sorted(value)))
        return recognised(shape, value)

    def _render(self, role: str, value: Mapping[str, Any]) -> str:
        try:
            return self.compiled[role].render(value)
        except jinja2.UndefinedError as error:
            raise Unfit("a column is missing", f"data.columns.{role}: {error}") from None
        except NotText as error:
            raise Unfit("a column is not text", f"data.columns.{role}: {error}") from None
        except Exception as error:  # a template is the user's program: it can fail in any way
            raise Unfit("a template failed", f"data.columns.{role}: {type(error).__name__}: {error}") from None


def shape_of(value: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The columns by which this record is recognised, or None."""
    return next((shape for shape in SHAPES if all(value.get(column) is not None for column in shape)), None)


def recognised(shape: tuple[str, ...], value: Mapping[str, Any]) -> Document:
    """A document from columns that are known by their names."""
    if shape in (("messages",), ("conversations",)):
        return _chat(value[shape[0]], value)
    if shape == ("text",):
        return _flat({"text": value["text"]})
    question, answer = value[shape[0]], value[shape[1]]
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational prompt and completion
        return _chat([*({**message, "weight": 0} for message in question), *answer], value)
    if shape[0] == "instruction" and value.get("input"):
        question = f"{_text(question, 'instruction')}\n\n{_text(value['input'], 'input')}"
    flat = {"user": question, "assistant": answer}
    if value.get("system"):
        flat = {"system": value["system"], **flat}
    return _flat(flat)


def _flat(parts: Mapping[str, Any]) -> Document:
    """A document from one text a role; `prompt` and `completion` are other words for `user` and `assistant`."""
    if "text" in parts:
        text = _text(parts["text"], "text")
        if not text.strip():
            raise Unfit("empty", "text")
        return Document(text=text)
    roles = {"prompt": "user", "completion": "assistant"}
    messages = []
    for part in ("system", "user", "prompt", "assistant", "completion"):
        if part not in parts:
            continue
        content = _text(parts[part], part)
        if content.strip():
            messages.append({"role": roles.get(part, part), "content": content})
        elif part != "system":
            raise Unfit("empty", part)
    return Document(messages=tuple(messages), trained=tuple(message["role"] == "assistant" for message in messages))


def _chat(messages: Any, value: Mapping[str, Any]) -> Document:
    """A document from a list of messages, `role` and `content` or ShareGPT's `from` and `value`.

    A message's `weight` of 0 takes the loss from that turn (OpenAI's format).
    """
    if isinstance(messages, str):
        messages = _json(messages)
    if not isinstance(messages, (list, tuple)):
        raise Unfit("wrong type", f"messages is {type(messages).__name__}, not a list")
    if not messages:
        raise Unfit("empty", "messages")
    turns = [_message(message) for message in messages]
    weights = [turn.pop("weight", 1) for turn in turns]
    trained = tuple(turn["role"] == "assistant" and weight != 0 for turn, weight in zip(turns, weights, strict=True))
    tools = value.get("tools")
    tools = _json(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unfit("wrong type", "tools is not a list of objects")
    return Document(messages=tuple(turns), trained=trained, tools=tuple(tools or ()))


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Unfit("wrong type", f"a message is {type(message).__name__}, not an object")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise Unfit("unknown role", str(role))
    extra = {
        key: entry
        for key, entry in message.items()
        if key not in ("role", "from", "content", "value") and entry is not None
    }
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if content is None and ROLES[role] == "assistant" and extra.get("tool_calls"):
        return {"role": "assistant", "content": "", **extra}
    content = _text(content, "content")
    if not content.strip() and ROLES[role] == "assistant" and not extra.get("tool_calls"):
        raise Unfit("empty", "an assistant turn")
    return {"role": ROLES[role], "content": content, **extra}


def _part(part: Any) -> str:
    """The text of one part of a message's content; pictures and sounds cannot be trained on here."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise Unfit("wrong type", "a part of a message is not text")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise Unfit("wrong type", "a column holds text that is not JSON") from None


def _need(value: Mapping[str, Any], column: str) -> Any:
    if value.get(column) is None:
        raise Unfit("a column is missing", column)
    return value[column]


def _text(value: Any, column: str) -> str:
    """Text as it is; numbers and booleans as JSON writes them; nothing else."""
    if isinstance(value, (int, float)):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise Unfit("wrong type", f"{column} is {type(value).__name__}, not text")
    if not value.isascii() and not is_text(value):
        raise Unfit("invalid UTF-8", column)
    return value
