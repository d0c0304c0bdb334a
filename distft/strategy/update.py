"""The optimizer step of DDP and FSDP: global norm, clipping, skipping and updating without waiting for the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distft.strategy.base import MakeOptimizer, Shard
from distft.strategy.birth import is_dtensor, local_rows
from distft.world import World


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one trained parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    parameter: nn.Parameter  # as the module has it: whole on every rank, or a DTensor
    local: nn.Parameter  # what the optimizer sees: always a plain tensor, on the same memory
    start: int  # flat index in the whole parameter of the first value held
    owned: tuple[int, int]  # which of the values held are this rank's in a checkpoint

    @property
    def replicated(self) -> bool:
        return self.local is self.parameter

    def take_gradient(self) -> None:
        """Let `local.grad` be this rank's gradient: zeros where no pass used the parameter, as in any other engine."""
        gradient: Any = self.parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(self.local)
        self.local.grad = gradient.to_local() if is_dtensor(gradient) else gradient


def even_part(length: int, rank: int, size: int) -> tuple[int, int]:
    """The range of `length` values that `rank` owns: equal parts, the last ones shorter or empty."""
    part = -(-length // size)
    return min(rank * part, length), min((rank + 1) * part, length)


def lay_out(name: str, parameter: nn.Parameter, group: dist.ProcessGroup) -> Piece:
    """A trained parameter; one that is whole on every rank is owned in even parts by the ranks of `group`."""
    if is_dtensor(parameter):
        local, start = local_rows(parameter)
        return Piece(name, tuple(parameter.shape), parameter, nn.Parameter(local), start, (0, local.numel()))
    owned = even_part(parameter.numel(), group.rank(), group.size())
    return Piece(name, tuple(parameter.shape), parameter, parameter, 0, owned)


class Update:
    """Pieces and their optimizer.

    Args:
        named_parameters: the trained parameters by the name they had before `prepare`.
        group: the ranks that together hold one copy of every parameter.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        make_optimizer: MakeOptimizer,
        clip: float,
        world: World,
        group: dist.ProcessGroup,
    ) -> None:
        self.pieces = [lay_out(name, parameter, group) for name, parameter in named_parameters]
        self.optimizer: Any = make_optimizer([(piece.name, piece.local) for piece in self.pieces])
        self.clip = clip
        self.world = world
        self.group = group
        self.num_copies = world.size // group.size()
        self.updates = torch.zeros((), device=world.device)  # counted where skipping is decided

    @property
    def num_updates(self) -> int:
        return int(self.updates)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self.updates.fill_(value)
        for piece in self.pieces:
            if piece.local.numel() and self.moments(piece):
                self.optimizer.state[piece.local]["step"].fill_(value)

    @torch.no_grad()
    def step(self, lr: float, keep: bool | Tensor) -> Tensor:
        """Clip and update from the gradients of `parameter`; returns the global norm before clipping, fp32 scalar.

        Where the norm is not finite, or `keep` says so on the device, the kernels leave weights, moments and step
        count as they were.
        """
        gradients = self.gradients()
        norm = self.norm(gradients)
        if keep is not False:
            kept = norm.isfinite() if keep is True else norm.isfinite() & keep
            found_inf = (~kept).float()
            self.optimizer.found_inf = found_inf
            self.optimizer.grad_scale = (norm / self.clip).clamp(min=1.0) if self.clip > 0 else None
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
            # Fused optimizers do not say that they wrote, and adapters are cast anew only where somebody did.
            torch.autograd.graph.increment_version([piece.local for piece in self.pieces])
            self.updates += 1 - found_inf
        return norm

    def gradients(self) -> list[Tensor]:
        """This rank's gradient of every piece that has values here, in the order of the pieces."""
        gradients = []
        for piece in self.pieces:
            if piece.local.numel():
                piece.take_gradient()
                assert piece.local.grad is not None
                gradients.append(piece.local.grad)
        return gradients

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """2-norm over all ranks; every rank gets the same bits, so that all decide alike.

        Replicated gradients are equal on all ranks and are counted once; rows are summed over all ranks and divided
        by the number of copies.
        """
        held = [piece.replicated for piece in self.pieces if piece.local.numel()]
        whole = [gradient for gradient, replicated in zip(gradients, held, strict=True) if replicated]
        rows = [gradient for gradient, replicated in zip(gradients, held, strict=True) if not replicated]
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if not all(piece.replicated for piece in self.pieces):  # the same on every rank, unlike `rows`
            if rows:
                square += torch.nn.utils.get_total_norm(rows).double().square()
            dist.all_reduce(square)
            square /= self.num_copies
        if whole:
            square += torch.nn.utils.get_total_norm(whole).double().square()
        return square.sqrt().float()

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        """The optimizer's moments of a piece, made as zeros before the first step; none for SGD."""
        if "betas" not in self.optimizer.defaults:
            return {}
        state = self.optimizer.state[piece.local]
        if not state:
            state["step"] = self.updates.clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(piece.local, memory_format=torch.preserve_format)
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}

    def values(self) -> Iterator[tuple[Piece, str, Tensor]]:
        """Piece, kind and flat view of everything that training changes on this rank."""
        for piece in self.pieces:
            if piece.local.numel():
                for kind, tensor in {"param": piece.local.detach(), **self.moments(piece)}.items():
                    yield piece, kind, tensor.view(-1)

    def shards(self) -> Iterator[Shard]:
        for piece, kind, flat in self.values():
            first, last = piece.owned
            if first < last:
                yield Shard(piece.name, kind, piece.shape, piece.start + first, flat[first:last])

    def release(self) -> None:
        self.optimizer.state.clear()
        for piece in self.pieces:
            piece.local.grad = piece.parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what is held whole equal on every rank again, after each overwrote the part that it owns."""
        size = self.group.size()
        for piece, _, flat in self.values():
            if piece.replicated and size > 1:
                part = -(-flat.numel() // size)
                first, last = piece.owned
                mine = torch.nn.functional.pad(flat[first:last], (0, part - (last - first)))
                everyone = flat.new_empty(size, part)
                dist.all_gather(list(everyone), mine, group=self.group)
                flat.copy_(everyone.view(-1)[: flat.numel()])


@torch.no_grad()
def gather(
    parameters: dict[str, nn.Parameter], names: Iterable[str] | None, world: World
) -> Iterator[tuple[str, Tensor | None]]:
    """Full tensors one by one, on rank 0 on the CPU and None elsewhere; `names` None: the trained ones."""
    if names is None:
        names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    for name in names:
        parameter: Any = parameters[name].detach()
        full = parameter.full_tensor() if is_dtensor(parameter) else parameter
        yield name, full.to("cpu", copy=True) if world.is_main else None
