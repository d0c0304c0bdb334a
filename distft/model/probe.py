"""Logits at a few positions of a few prompts: what a saved model must compute again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distft.model.decode import padded

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of the logits' spread; rounding a whole model to bf16 costs about 0.01
NOISE = {"fp32": 1e-4, "bf16": 0.02}  # below it, two logits say nothing about whether weights differ
MOST_LIKELY, EVENLY_SPACED = 8, 120  # entries of the vocabulary that are kept at each position
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a +",
    "One, two, three, four, five, six, seven,",
)
"""Words of nobody's data, since they are stored with the model."""
LONGEST, POSITIONS = 48, 4  # tokens of a prompt, positions at which logits are kept


def prompt_ids(tokenizer: Any) -> list[list[int]]:
    """The three prompts as token ids; plain counting where the tokenizer makes nothing of one."""
    vocabulary = len(tokenizer)
    rows = [tokenizer(text, add_special_tokens=True)["input_ids"][:LONGEST] for text in PROMPTS]
    return [list(row) or [index % vocabulary for index in range(LONGEST)] for row in rows]


def positions_of(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Columns of each row at which logits are kept: its first, its last and some between."""
    return [torch.linspace(0, len(row) - 1, POSITIONS).long().unique().tolist() for row in rows]


@dataclass(frozen=True)
class Probe:
    """Logits that the trainer computed at a few positions with the weights it is about to save."""

    input_ids: Tensor  # [rows, length] int64, right-padded
    attention_mask: Tensor  # [rows, length] bool, True on real tokens
    positions: Tensor  # [n] int64, row * length + column
    logits: Tensor  # [n, vocab] on the CPU


@dataclass(frozen=True)
class Recorded:
    """A probe's logits at chosen entries of the vocabulary, in full precision: the likeliest and some evenly spaced."""

    input_ids: Tensor  # [rows, length] int64, right-padded
    attention_mask: Tensor  # [rows, length] bool
    positions: Tensor  # [n] int64
    entries: Tensor  # [n, chosen] int64
    values: Tensor  # [n, chosen] fp32
    spread: Tensor  # [n] fp32: root mean square of all logits around their mean

    @classmethod
    def of(cls, probe: Probe) -> Recorded:
        logits = probe.logits.detach().float().cpu()
        count, vocabulary = logits.shape
        if vocabulary <= MOST_LIKELY + EVENLY_SPACED:
            entries = torch.arange(vocabulary).expand(count, vocabulary)
        else:
            even = torch.linspace(0, vocabulary - 1, EVENLY_SPACED).long().expand(count, EVENLY_SPACED)
            entries = torch.cat([logits.topk(MOST_LIKELY).indices, even], dim=1)
        spread = (logits - logits.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt()
        where = (probe.input_ids.cpu(), probe.attention_mask.cpu(), probe.positions.cpu())
        return cls(*where, entries, logits.gather(1, entries), spread)

    def as_json(self) -> list[dict[str, Any]]:
        """A prompt each: its token ids, and per position the column, entries, values and spread."""
        length = self.input_ids.shape[1]
        prompts: list[dict[str, Any]] = [
            {"input_ids": row[mask].tolist(), "positions": []}
            for row, mask in zip(self.input_ids, self.attention_mask, strict=True)
        ]
        for index, position in enumerate(self.positions.tolist()):
            prompts[position // length]["positions"].append(
                {
                    "column": position % length,
                    "entries": self.entries[index].tolist(),
                    "logits": self.values[index].tolist(),
                    "spread": self.spread[index].item(),
                }
            )
        return prompts

    @classmethod
    def of_json(cls, prompts: Sequence[dict[str, Any]]) -> Recorded:
        """
        Raises:
            KeyError, TypeError, ValueError: it is not what `as_json` makes.
        """
        rows = [[int(token) for token in prompt["input_ids"]] for prompt in prompts]
        input_ids, _, mask, _ = padded(rows, torch.device("cpu"))
        length = input_ids.shape[1]
        found = [(row, one) for row, prompt in enumerate(prompts) for one in prompt["positions"]]
        if not all(0 <= one["column"] < len(rows[row]) for row, one in found):
            raise ValueError("a position lies outside its prompt")
        return cls(
            input_ids,
            mask,
            torch.tensor([row * length + one["column"] for row, one in found]),
            torch.tensor([one["entries"] for _, one in found]),
            torch.tensor([one["logits"] for _, one in found], dtype=torch.float32),
            torch.tensor([one["spread"] for _, one in found], dtype=torch.float32),
        )

    def distance(self, logits: Tensor) -> float:
        """Root mean square difference to `logits` [n, vocab], relative to the recorded logits' spread."""
        if self.entries.max() >= logits.shape[1]:
            return float("inf")
        difference = logits.float().cpu().gather(1, self.entries) - self.values
        return float(difference.square().mean().sqrt() / self.spread.square().mean().sqrt().clamp_min(1e-12))


@torch.no_grad()
def logits_of(model: nn.Module, probe: Probe | Recorded) -> Tensor:
    """[n, vocab] fp32 on the CPU, of a plain model."""
    device = next(model.parameters()).device
    logits = model(input_ids=probe.input_ids.to(device), attention_mask=probe.attention_mask.long().to(device)).logits
    return logits.flatten(0, 1)[probe.positions.to(device)].float().cpu()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square difference relative to the logits' spread around their mean at each position."""
    theirs = theirs.float().cpu()
    spread = theirs - theirs.mean(dim=-1, keepdim=True)
    return float((ours - theirs).norm() / spread.norm().clamp_min(1e-12))
