"""Which knobs may change between two halves of a run: every knob of the schema is in one of these classes.

A changed harmful one makes another run of it: other samples, or weights that mean something else. Harmless ones are a
person's to change between two halves, and are told. What is hashed is told too, and judged by the hash of what comes of
it: the tokenised data, the tokenizer, the model's configuration.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from distft.config.given import SURROUNDINGS, all_knobs, value_of, within
from distft.config.redact import redact_tree
from distft.config.schema import Run

HARMFUL = (
    "seed",
    "batch.global_size",
    "data.sequence_length",
    "objective",
    "optim.name",
    "tuning.method",
    "tuning.lora_rank",
    "tuning.lora_alpha",
    "tuning.target",
    "tuning.rslora",
    "tuning.dora",
)
HARMLESS = (
    "precision",
    "epochs",
    "max_steps",
    "batch.micro_size",
    "batch.pass_tokens",
    "data.packing",
    "model.attention",
    "model.kernels",
    "model.head",
    "model.compile",
    "tuning.lora_dropout",
    "optim.lr",
    "optim.weight_decay",
    "optim.betas",
    "optim.eps",
    "optim.clip",
    "schedule",
    "strategy",
    "activation",
    "eval",
    "early_stopping",
    "checkpoint",
    "guard",
    "verify",
)
HASHED = {
    "data": (
        "data.path",
        "data.format",
        "data.columns",
        "data.exclude_ids",
        "data.subset",
        "data.split",
        "data.sources",
        "data.eval_path",
        "data.eval_split",
        "data.eval_fraction",
        "data.too_long",
        "data.multi_turn",
        "data.train_on",
        "data.max_row_bytes",
    ),
    "tokenizer": ("data.chat_template",),
    "model": ("model.name", "model.path", "model.revision", "model.tiny"),
}
"""By the name under which the hash is compared."""

NOT_COMPARED = (*SURROUNDINGS, "data.max_rejected", "model.trust_remote_code")
"""Where a run goes on and what it tells; two halves may always differ in them."""


def classes_of(name: str) -> list[str]:
    """The classes that a knob is in: one, or somebody has forgotten to decide."""
    classes = {"harmful": HARMFUL, "harmless": HARMLESS, "not compared": NOT_COMPARED, **HASHED}
    return [label for label, sections in classes.items() if within(name, sections)]


def compared(run: Run) -> dict[str, Any]:
    """The knobs that a checkpoint remembers, by dotted name, in JSON's types and without secrets."""
    names = [name for name in all_knobs() if not within(name, NOT_COMPARED)]
    values = {name: value_of(run, name) for name in names}
    values["data.sources"] = [dataclasses.asdict(source) for source in run.data.sources]
    return dict(json.loads(json.dumps(redact_tree(values))))


def changed(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Knobs whose values differ; one that only one side knows belongs to another version and says nothing."""
    return [name for name in now if name in saved and saved[name] != now[name]]
