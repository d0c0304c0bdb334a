"""Every rank holds rows of every parameter (FSDP2, Zhao et al. 2023, arXiv:2304.11277); hsdp: copies of such groups."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distft.config.schema import Run
from distft.errors import UserMistake
from distft.model.load import finish_buffers
from distft.strategy.base import MakeOptimizer, Shard
from distft.strategy.birth import empty_on, has_separate_experts, read_weights, set_dtypes
from distft.strategy.update import Update, gather
from distft.world import World

if TYPE_CHECKING:
    from distft.objective.trainee import LogitsRequest, LossRequest, LossSums, Trainee
    from distft.weights.store import Weights


# torch 2.13's FSDP2 calls collectives by names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


class Fsdp:
    """`strategy=fsdp` shards over all ranks; `strategy=hsdp` over `strategy.shard_size` ranks, copied over the others.

    Trained rows are kept in fp32; a bf16 run gathers and computes in bf16 and reduces gradients in fp32.
    """

    trainee: Trainee

    def __init__(self, run: Run, world: World, precision: str) -> None:
        self.clip = run.optim.clip
        self.world = world
        self.precision = precision
        self.mesh = hybrid_mesh(run.strategy.shard_size, world) if run.strategy.name == "hsdp" else flat_mesh(world)
        self.shard_group = self.mesh.get_group(self.mesh.ndim - 1)
        self.writes_shards = world.rank < self.shard_group.size()
        self.reducing = True  # whether backward passes reduce gradients, FSDP2's state from the start

    def born(self) -> AbstractContextManager[Any]:
        return torch.device("meta")

    def prepare(
        self, trainee: Trainee, blocks: list[nn.Module], weights: Weights, make_optimizer: MakeOptimizer
    ) -> None:
        self.trainee = trainee
        set_dtypes(trainee, self.precision)
        self.root = shard(trainee, blocks, self.mesh, self.precision)
        empty_on(trainee, self.world.device)
        finish_buffers(trainee.model, self.world.device)
        read_weights(trainee.model, weights)
        self.parameters = dict(trainee.model.named_parameters())
        trained = [(name, parameter) for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.scalars = [parameter for _, parameter in trained if not isinstance(parameter, DTensor)]
        self.update = Update(trained, make_optimizer, self.clip, self.world, self.shard_group)

    def forward(self, request: LossRequest | LogitsRequest) -> LossSums | Tensor:
        answer = self.trainee(request)
        if not torch.is_grad_enabled():
            self.root.reshard()  # FSDP2 waits for a backward pass before it frees the root's own parameters
        return answer

    def backward(self, loss: Tensor, last: bool) -> None:
        if last != self.reducing:
            self.root.set_requires_gradient_sync(last)
            self.reducing = last
        loss.backward()

    def step(self, lr: float, keep: bool = True) -> Tensor:
        self.sum_scalars()
        norm = self.update.step(lr, keep)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.update.optimizer.zero_grad()
        return norm

    def sum_scalars(self) -> None:
        """Reduce the gradients of parameters without dimensions: FSDP2 has no rows to give out and ignores them."""
        if self.scalars:
            gradients = [torch.zeros_like(scalar) if scalar.grad is None else scalar.grad for scalar in self.scalars]
            together = torch.stack(gradients)
            dist.all_reduce(together)
            for scalar, gradient in zip(self.scalars, together.unbind(), strict=True):
                scalar.grad = gradient

    @property
    def num_updates(self) -> int:
        return self.update.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self.update.num_updates = value

    def shards(self) -> Iterator[Shard]:
        return self.update.shards()

    def refresh(self) -> None:
        self.root.reshard()
        self.update.refresh()

    def gather(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        return gather(self.parameters, names, self.world)


def flat_mesh(world: World) -> DeviceMesh:
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))


def hybrid_mesh(shard_size: int | str, world: World) -> DeviceMesh:
    """[copies, ranks that share one]; `auto` shares a copy among the ranks of one node.

    Raises:
        UserMistake: the ranks cannot be divided so.
    """
    if shard_size == "auto":
        most = torch.tensor(world.local_rank, device=world.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        shard_size = int(most) + 1
    shard_size = int(shard_size)
    if shard_size < 1 or world.size % shard_size:
        fitting = [size for size in range(1, world.size + 1) if world.size % size == 0]
        raise UserMistake(
            f"strategy.shard_size={shard_size} does not divide the {world.size} ranks. "
            f"Set strategy.shard_size to one of {', '.join(map(str, fitting))}, or use strategy=fsdp."
        )
    shape = (world.size // shard_size, shard_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(trainee: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, precision: str) -> FSDPModule:
    """Apply `fully_shard` to every block and to the whole; embeddings, last norm and head belong to the whole.

    The whole stays gathered between forward and backward, the blocks do not; each gathers the next one ahead.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    scalars = {parameter for parameter in trainee.parameters() if parameter.ndim == 0}
    for module in (*blocks, trainee):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    root, *inner = sharded = [module for module in (trainee, *blocks) if isinstance(module, FSDPModule)]

    for module in sharded:
        # The gradient contract wants sums. FSDP2 averages by default; this is the one place that takes it back. Only
        # sums: a divisor alone asks for a pre-multiplied reduction, which gloo lacks.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    for module, following in pairwise(sharded):
        module.set_modules_to_forward_prefetch([following])
    for module, following in pairwise([root, *reversed(inner)]):
        module.set_modules_to_backward_prefetch([following])
    if has_separate_experts(name for name, parameter in trainee.named_parameters() if parameter.requires_grad):
        allow_unused(root)
    return root


def allow_unused(root: FSDPModule) -> None:
    """Let parameters without a gradient on this rank take part in the reduction with zeros.

    Raises:
        UserMistake: this torch cannot.
    """
    if not hasattr(root, "set_reduce_scatter_unused_params"):
        raise UserMistake(
            "The experts of this model are modules of their own, and some may see no token on a rank: strategy=fsdp "
            "and strategy=hsdp need torch >= 2.13 for that. Update torch, or use strategy=zero3 or strategy=ddp."
        )
    root.set_reduce_scatter_unused_params(True)
