"""Every rank holds rows of every parameter (FSDP2, Zhao et al. 2023, arXiv:2304.11277); hsdp: copies of such groups."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from distft.config.schema import Run
from distft.config.schema import Strategy as StrategyOptions
from distft.errors import UserMistake
from distft.model.load import base_of, finish_buffers
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

    Trained rows are kept in fp32; a bf16 run gathers and computes in bf16 and reduces gradients in fp32, or sends them
    in bf16 with `strategy.communication=bf16`.
    """

    trainee: Trainee

    def __init__(self, run: Run, world: World, precision: str) -> None:
        self.clip = run.optim.clip
        self.world = world
        self.precision = precision
        self.options = run.strategy
        self.mesh = hybrid_mesh(run.strategy.shard_size, world) if run.strategy.name == "hsdp" else flat_mesh(world)
        self.shard_group = self.mesh.get_group(self.mesh.ndim - 1)
        self.writes_shards = world.rank < self.shard_group.size()
        self.ending = True  # whether a backward pass is told to be the step's last, FSDP2's state from the start

    def born(self) -> AbstractContextManager[Any]:
        return torch.device("meta")

    def prepare(
        self, trainee: Trainee, blocks: list[nn.Module], weights: Weights, make_optimizer: MakeOptimizer
    ) -> None:
        self.trainee = trainee
        set_dtypes(trainee, self.precision)
        self.sharded = shard(trainee, blocks, self.mesh, self.precision, self.options)
        self.root = self.sharded[0]
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
            self.drop_gathered()  # FSDP2 waits for a backward pass before it frees what it keeps behind a forward pass
        return answer

    def backward(self, loss: Tensor, last: bool) -> None:
        if last != self.ending:
            self.ending = last
            if self.options.gradient_sync == "last":
                self.root.set_requires_gradient_sync(last)
            else:
                self.root.set_requires_all_reduce(last)  # hsdp: between copies still once a step
            if self.options.reshard_after_forward is False:
                self.root.set_reshard_after_backward(last)
        loss.backward()

    def step(self, lr: float, keep: bool | Tensor = True) -> Tensor:
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

    def drop_gathered(self) -> None:
        for module in self.sharded:
            module.reshard()

    def refresh(self) -> None:
        self.drop_gathered()
        self.update.refresh()

    def release(self) -> None:
        self.update.release()

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


def shard(
    trainee: Trainee, blocks: list[nn.Module], mesh: DeviceMesh, precision: str, options: StrategyOptions
) -> list[FSDPModule]:
    """Apply `fully_shard` to every block, to embedding and head where they are apart, and to the whole, which has the
    rest. Returns these groups, the whole first.

    Each gathers the next one ahead. What is needed again as soon as the forward pass ends (the head, the last block)
    or is hardly anything (the rest) stays gathered for the backward pass; `strategy.reshard_after_forward` decides on
    the other blocks.

    Raises:
        UserMistake: a number there that does not divide the ranks of a shard group.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    scalars = {parameter for parameter in trainee.parameters() if parameter.ndim == 0}
    drops = options.reshard_after_forward
    check_group(drops, mesh)
    apply = partial(fully_shard, mesh=mesh, ignored_params=scalars)
    for module in blocks:
        apply(module, mp_policy=policy, reshard_after_forward=module is not blocks[-1] if drops == "auto" else drops)
    embedding, head = own_groups(trainee)
    as_it_comes = replace(policy, cast_forward_inputs=False)
    if embedding is not None:
        apply(embedding, mp_policy=as_it_comes, reshard_after_forward=drops is not False)
    if head is not None:
        apply(head, mp_policy=as_it_comes, reshard_after_forward=False)
    apply(trainee, mp_policy=policy, reshard_after_forward=False)
    groups = sharded_among([trainee, embedding, *blocks, head])
    through = sharded_among(reversed(passed_backward(trainee, blocks)))

    for group in groups:
        # The gradient contract wants sums. FSDP2 averages by default; this is the one place that takes it back. Only
        # sums: a divisor alone asks for a pre-multiplied reduction, which gloo lacks.
        if mesh.size() > 1:  # alone there is nothing to take back, and FSDP2 would divide by this 1.0
            group.set_force_sum_reduction_for_comms(True)
            group.set_gradient_divide_factor(1.0)
        if options.communication == "bf16":
            group.set_custom_reduce_scatter(ReduceScatterInBf16())
    for group in sharded_among([embedding]):
        group.set_unshard_in_backward(False)  # a look-up's gradient asks for rows' numbers, not for the weight
    for group, following in pairwise(groups):
        group.set_modules_to_forward_prefetch([following])
    for group, following in pairwise([groups[0], *through]):
        group.set_modules_to_backward_prefetch([following])
    if has_separate_experts(name for name, parameter in trainee.named_parameters() if parameter.requires_grad):
        allow_unused(groups[0])
    return groups


def sharded_among(modules: Iterable[Any]) -> list[FSDPModule]:
    return [module for module in modules if isinstance(module, FSDPModule)]


def check_group(drops: Any, mesh: DeviceMesh) -> None:
    num_ranks = mesh.size(mesh.ndim - 1)
    if not isinstance(drops, bool) and isinstance(drops, int) and num_ranks % drops:
        fitting = [size for size in range(2, num_ranks + 1) if num_ranks % size == 0]
        raise UserMistake(
            f"strategy.reshard_after_forward={drops} does not divide the {num_ranks} ranks that share a copy. "
            f"Set it to auto, true, false or one of {', '.join(map(str, fitting))}."
        )


def own_groups(trainee: Trainee) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the head, each if it is a plain module with a weight of its own.

    Together with the rest of the model they would be gathered from a step's first operation to its last.
    """
    base = base_of(trainee.model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or embedding.weight is head.weight:
        return None, None
    asked_as_module = "forward" in vars(head)  # ours; a model's own way to its logits may use the weight directly
    return embedding, head if asked_as_module else None


def passed_backward(trainee: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """The blocks that a backward pass goes through: none below the lowest trained parameter."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    if any(parameter.requires_grad and id(parameter) not in inside for parameter in trainee.parameters()):
        return blocks
    trains = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return blocks[trains.index(True) :] if any(trains) else []


class ReduceScatterInBf16(DefaultReduceScatter):
    """Gradients travel in bf16; what a rank summed over its micro-batches and what it gets are in fp32.

    FSDP2's own `reduce_dtype` would also sum micro-batches in bf16.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        low = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.reduce_scatter_tensor(low, input_tensor.to(torch.bfloat16), group=group, op=op)
        output_tensor.copy_(low)


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
