"""Every rank holds the whole model and all-reduces gradients (torch DistributedDataParallel, Li et al. 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from distft.config.schema import Run
from distft.model.load import finish_buffers
from distft.strategy.base import MakeOptimizer, Shard
from distft.strategy.birth import empty_on, has_separate_experts, read_weights, set_dtypes
from distft.strategy.update import Update, gather
from distft.world import World

if TYPE_CHECKING:
    from distft.objective.trainee import LogitsRequest, LossRequest, LossSums, Trainee
    from distft.weights.store import Weights


class Ddp:
    """Trained parameters are their own fp32 master; a bf16 run computes under autocast, with frozen weights in bf16.

    A world of one rank runs the trainee itself.
    """

    trainee: Trainee
    writes_shards = True

    def __init__(self, run: Run, world: World, precision: str) -> None:
        self.clip = run.optim.clip
        self.communication = torch.bfloat16 if run.strategy.communication == "bf16" else torch.float32
        self.world = world
        self.precision = precision
        self.last = True  # whether this backward pass ends the step

    def born(self) -> AbstractContextManager[Any]:
        return torch.device("meta")

    def prepare(
        self, trainee: Trainee, blocks: list[nn.Module], weights: Weights, make_optimizer: MakeOptimizer
    ) -> None:
        self.trainee = trainee
        set_dtypes(trainee, self.precision)
        empty_on(trainee, self.world.device)
        finish_buffers(trainee.model, self.world.device)
        read_weights(trainee.model, weights)
        self.parameters = dict(trainee.model.named_parameters())
        trained = [(name, parameter) for name, parameter in self.parameters.items() if parameter.requires_grad]
        group = dist.group.WORLD
        assert group is not None
        self.update = Update(trained, make_optimizer, self.clip, self.world, group)
        self.module: nn.Module = trainee
        if self.world.size == 1:
            trainee.add_gradients()
        else:
            self.module = self.wrap(trainee, has_separate_experts(name for name, _ in trained))

    def wrap(self, trainee: Trainee, find_unused_parameters: bool) -> DistributedDataParallel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.11 lacks the name
            wrapped = DistributedDataParallel(
                trainee,
                broadcast_buffers=False,
                init_sync=False,  # every rank read the same weights
                gradient_as_bucket_view=True,
                find_unused_parameters=find_unused_parameters,
            )
        # not the function itself: DDP wants no annotations, or evaluated ones
        wrapped.register_comm_hook(self, lambda strategy, bucket: sum_over_ranks(strategy, bucket))
        return wrapped

    def forward(self, request: LossRequest | LogitsRequest) -> LossSums | Tensor:
        module = self.module if torch.is_grad_enabled() else self.trainee
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return module(request)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.last = last
        loss.backward()

    def step(self, lr: float, keep: bool | Tensor = True) -> Tensor:
        norm = self.update.step(lr, keep)
        # DDP's gradients are views into its buckets: cleared in place they stay there and are never copied. On a CPU
        # new ones would lie between activations, and leave their memory in pieces; on a GPU alone to make them is
        # cheaper than to clear them and add to them.
        alone = self.world.size == 1 and self.world.device.type == "cuda"
        self.update.optimizer.zero_grad(set_to_none=alone)
        return norm

    @property
    def num_updates(self) -> int:
        return self.update.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self.update.num_updates = value

    def shards(self) -> Iterator[Shard]:
        return self.update.shards()

    def refresh(self) -> None:
        self.update.refresh()

    def release(self) -> None:
        self.update.release()

    def gather(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        return gather(self.parameters, names, self.world)


def sum_over_ranks(strategy: Ddp, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's reduction of one bucket: a plain sum in place of its average, and only behind the last micro-batch.

    The other micro-batches accumulate in the bucket of this rank. DDP's own way to skip a reduction, `no_sync`, wants
    to be told in the forward pass; a hook is asked in the backward pass, where it is known.
    """
    if not strategy.last:
        return noop_hook(None, bucket)
    gradients = bucket.buffer()
    future = dist.all_reduce(gradients.to(strategy.communication), async_op=True).get_future()  # `to`: itself in fp32
    return future.then(lambda done: gradients.copy_(done.value()[0]))
