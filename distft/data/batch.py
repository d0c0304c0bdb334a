"""What one forward pass of one rank is given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Two layouts of the same documents: packed (one row, no padding), or one document a row.

    The targets are already shifted: the token at flat position `positions[i]` of `input_ids` predicts `targets[i]`.
    """

    input_ids: Tensor  # [rows, length] int64; packed: rows == 1
    position_ids: Tensor  # [rows, length] int64, restarting at 0 with every document
    attention_mask: Tensor | None  # [rows, length] bool, True on real tokens; None when packed
    cu_seqlens: Tensor | None  # [documents + 1] int32, document boundaries of the packed row; None when unpacked
    max_length: int  # longest document
    positions: Tensor  # [supervised] int64, row * length + column of the position that predicts
    targets: Tensor  # [supervised] int64
    sources: Tensor  # [supervised] int64, index of the source that the target belongs to
    num_tokens: int  # real tokens, no padding
    documents: tuple[tuple[int, int], ...] = ()  # (source, row) of every document: the sample ids
    lengths: tuple[int, ...] = ()  # documents' lengths on the host, in the order of cu_seqlens

    @property
    def num_supervised(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch on `device`; copies do not wait where the memory is pinned."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    @classmethod
    def empty(cls, token: int = 0) -> Batch:
        """A micro-batch that trains nothing: what a rank runs whose bins have run out while others still compute."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            input_ids=torch.full((1, 2), token, dtype=torch.int64),
            position_ids=torch.arange(2)[None],
            attention_mask=None,
            cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
            max_length=2,
            positions=none,
            targets=none,
            sources=none,
            num_tokens=0,
            lengths=(2,),
        )


@dataclass(frozen=True)
class Step:
    """One global batch as one rank sees it: its own micro-batches, and counts over all ranks known to every rank."""

    index: int  # number of the step in the run, from 0
    micro_batches: tuple[Batch, ...]  # every rank has the same number; short ranks hold empty ones
    num_supervised: int  # over all ranks
    num_tokens: int  # real tokens over all ranks
    source_supervised: tuple[int, ...]  # supervised tokens by source over all ranks
    source_tokens: tuple[int, ...]  # real tokens by source over all ranks
    first_bin: int  # number of the step's first bin in the whole run: seeds the step's random numbers
    parts: tuple[tuple[int, int], ...] = ()  # of each pass: its micro-batch, and which part of it

    def place(self, index: int) -> tuple[int, int]:
        """Which micro-batch the forward pass `index` belongs to, and which part of it it is."""
        return self.parts[index] if self.parts else (index, 0)

    @property
    def left_out(self) -> bool:
        """Whether the run passes over this step: nobody has anything to do."""
        return not self.micro_batches
