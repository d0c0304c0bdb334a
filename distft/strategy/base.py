"""What the loop asks of an engine, and the gradient contract that every engine keeps.

The contract: `backward` receives sum(token NLL) / (supervised tokens of the global batch), so the gradient wanted is
the plain *sum* over ranks and micro-batches. Each engine cancels its own averaging in one named place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from distft.objective.trainee import LogitsRequest, LossRequest, LossSums, Trainee
    from distft.weights.store import Weights

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], "Optimizer"]
"""Builds the optimizer from (name, parameter as the engine laid it out); names are those before `prepare`."""


@dataclass(frozen=True)
class Shard:
    """One contiguous range that this rank owns of a flattened trained parameter or of one of its moments."""

    name: str  # the parameter's name before `prepare`, with no wrapper prefix
    kind: str  # "param" (the fp32 master), "exp_avg" or "exp_avg_sq"
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first flat index of the range
    tensor: Tensor  # [length] fp32, a view: writing into it changes the engine's state once `refresh` ran


class Strategy(Protocol):
    """An engine: how a trainee is laid over the ranks. The loop never asks which one it has."""

    trainee: Trainee
    writes_shards: bool  # this rank's shards belong in a checkpoint; False on hsdp's further replicas, which only load
    num_updates: int  # updates applied so far (skipped ones not counted); AdamW's `step`; set on resume

    def born(self) -> AbstractContextManager[Any]:
        """The context in which the model is built (on meta, or partitioned from birth)."""
        ...

    def prepare(
        self, trainee: Trainee, blocks: list[nn.Module], weights: Weights, make_optimizer: MakeOptimizer
    ) -> None:
        """Shard the trainee along `blocks`, stream `weights` in by name, then build the optimizer.

        `weights` has every parameter and persistent buffer of `trainee.model` under its name there (frozen ones too).
        """
        ...

    def forward(self, request: LossRequest | LogitsRequest) -> LossSums | Tensor:
        """Run the trainee through the engine; every rank makes the same sequence of calls.

        A logits request needs no gradients: the caller holds `torch.no_grad()` around it.
        """
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last`: the step's last micro-batch, after which gradients are reduced."""
        ...

    def step(self, lr: float, keep: bool | Tensor = True) -> Tensor:
        """Clip, update with `lr` times each group's `lr_scale`, zero. Returns the global norm before clipping, fp32.

        Where the norm is not finite, or `keep` is False, no rank changes a weight or a moment: gradients are dropped.
        `keep` may be a flag on the device (no dimensions, bool, the same on every rank), for which nothing waits.
        """
        ...

    def shards(self) -> Iterator[Shard]:
        """Every range this rank owns; moments are created (zeros) where the engine has none yet."""
        ...

    def refresh(self) -> None:
        """Bring the low-precision copies in line after shards were overwritten."""
        ...

    def release(self) -> None:
        """Free what only further steps need, the moments: training is over, and no `step` or `shards` follows."""
        ...

    def gather(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """Full tensors of parameters (None: all trained ones) one by one: on rank 0 on the CPU, None elsewhere.

        Collective: every rank iterates to the end. Trained parameters come from their fp32 master.
        """
        ...
