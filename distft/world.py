"""Who this process is among the ranks, and the few collectives that are not a strategy's own."""

from __future__ import annotations

import datetime
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store


@dataclass(frozen=True)
class World:
    """The place of this process. `data_rank` of `data_size` is the share of the global batch that it takes."""

    rank: int
    size: int
    local_rank: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def device_for(local_rank: int) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def join(store: Store | None = None, timeout: float = 600.0) -> World:
    """Join the process group named by RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous variables.

    A single process without those variables becomes a world of one. `store`: one that is connected already, so that
    what was agreed before the group existed and the group itself share a port. `timeout`: seconds a collective may
    take. Every world, also of one rank, has a process group, so that no caller asks.
    """
    import torch
    import torch.distributed as dist

    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = device_for(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if store is None:
            store = dist.HashStore() if size == 1 else next(iter(dist.rendezvous("env://")))[0]
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("process_group", store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core slow each other down many times over.
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    torch.set_float32_matmul_precision("highest")  # no TF32 on CUDA: fp32 means what it says
    torch.backends.cudnn.allow_tf32 = False  # nor in convolutions, where it is on by default
    return World(rank, size, local_rank, rank, size, device)


def longest_wait(stall_seconds: float) -> float:
    """Seconds a collective may take: longer than ranks may stand still, since a rank that moves may be waited for.

    Whoever stands still is found by heartbeats, which also tell who it is; that a collective gives up waiting is what
    is left where these fail.
    """
    return 60 + 6 * stall_seconds


def leave() -> None:
    """Leave the process group if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over(world: World, values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place, and return them."""
    import torch.distributed as dist

    if world.size > 1:
        dist.all_reduce(values)
    return values


def seed_of(*parts: int) -> int:
    """One 32-bit seed from several whole numbers, well mixed (NumPy's SeedSequence)."""
    import numpy

    return int(numpy.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; used per micro-batch, so that no generator state is ever saved."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def products_note(world: World, precision: str) -> list[str]:
    """`join` has turned TF32 off: who compares speeds should know."""
    said = "fp32: matrix products in full precision, TF32 is off; precision=bf16 is several times as fast"
    return [said] if world.device.type == "cuda" and precision == "fp32" else []
