"""Keeps secrets out of whatever is written down: configs, command lines, trackers, logs."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "[secret]"
_NAMES = {"APIKEY", "CREDENTIAL", "CREDENTIALS", "KEY", "PASSWD", "PASSWORD", "PAT", "SECRET", "TOKEN"}
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"  # not the end of a word, such as `task-…`
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|wandb_v\d_[A-Za-z0-9_]{20,}"  # Weights & Biases; older keys are bare hex, like a commit
    r"|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic and others; words alone are a name
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|AIza[\w-]{35}"  # Google
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"  # a JSON web token
    r")"
    r"|(?:(?<=://)|(?<=:/))[^/\s:@]+:[^/\s:@]+(?=@)"  # user:password of an address, also one taken for a path
)


def secrets_of_environment() -> list[str]:
    """Values of environment variables whose name says that they are secret, longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if _NAMES & set(name.upper().split("_")) and len(value) >= 8 and not value.startswith(("/", "~"))
    }
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """The same text with every known or likely secret replaced by `[secret]`."""
    for secret in secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def redact_tree(value: Any) -> Any:
    """The same lists, tuples and dicts with every string, also a key, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_tree(key): redact_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_tree(item) for item in value)
    return value
