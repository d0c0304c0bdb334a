from __future__ import annotations

from dataclasses import dataclass

from distft.config.schema.knob import choice


@dataclass
class Objective:
    name: str = choice("sft", "lm")
    """sft: supervised answers in a chat template. lm: next-token prediction on raw text."""
