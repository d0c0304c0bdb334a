"""Checkpoints written behind training: a step waits for a copy of this rank's ranges in host memory, and no longer."""

from __future__ import annotations

import dataclasses
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from distft import heartbeat
from distft.checkpoint import layout, ranges
from distft.checkpoint.ranks import DiskFull, Ranks
from distft.checkpoint.state import TrainState, load, owned, verify_saved
from distft.checkpoint.writing import write
from distft.config.schema import Run
from distft.errors import Stop
from distft.heartbeat import BESIDE
from distft.strategy.base import Shard
from distft.world import World, longest_wait

if TYPE_CHECKING:
    from distft.strategy.base import Strategy

LEAVE_SECONDS = 10.0  # how long a process that ends by a bug still gives the writer
CONTROL_GROUPS = Path("/sys/fs/cgroup")


class WriteBehind:
    """The checkpoints of one run: taken at a step, written by a thread, complete some steps later.

    The thread does what `state.write` does, in the same order; it talks to the other ranks' threads over a group of
    its own, so that training's collectives and its own never meet. One checkpoint is in the making at a time. What a
    thread could not do is raised by the next `wait` or `save`; `failed` tells that there is something to raise. Where
    a disk is full and `checkpoint.on_full=skip`, it is told through `say` instead and the run goes on. Every checkpoint
    is read back from the disk before it counts; the first is also compared bit for bit with what was trained.

    Use as a context: it is left when the last checkpoint is complete.
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        strategy: Strategy,
        world: World,
        say: Callable[[str], None] = print,
        prove: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """`prove`: what a checkpoint records to be verified by later, a collective that every save calls."""
        self.run, self.run_dir, self.strategy, self.world, self.say = run, run_dir, strategy, world, say
        self.prove = prove
        group = None
        if world.size > 1:
            longest = datetime.timedelta(seconds=longest_wait(run.guard.stall_seconds))
            group = dist.new_group(backend="gloo", timeout=longest, group_desc=BESIDE)
        self.ranks = Ranks(world, group)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.left_out: DiskFull | None = None  # why the last checkpoint is not there, by checkpoint.on_full=skip
        self.compared_one = False
        self.seconds: float | None = None  # that the last one took to be complete
        self.buffers: list[Tensor] = []  # the copies' memory, kept: fresh memory takes longer to come by than to fill

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            self.buffers = []  # what comes now needs the memory more
        elif self.thread is not None:  # what ends the run is told, not what the writer met
            self.thread.join(None if isinstance(error, Stop) else LEAVE_SECONDS)

    def save(self, state: TrainState, last: bool = False) -> None:
        """Take a checkpoint of `state`, once the one before it is complete.

        `last`: nothing is trained after it, so it needs no copy: it is written from the weights themselves, and
        complete when this returns.

        Raises:
            Stop: what became of the one before it, see `wait`.
        """
        self.wait()
        self.left_out = None
        state.num_updates = self.strategy.num_updates
        state.proof = self.prove() if self.prove is not None else {}
        shards, event = owned(self.strategy), None
        behind = self.run.checkpoint.background
        if last:
            behind, self.buffers = False, []
        elif behind == "auto":
            behind = bool(self.buffers) or fits_beside(shards)
        if behind:
            shards, event = self.copied(shards)
        values = dataclasses.asdict(state)
        self.thread = threading.Thread(
            target=self._write, args=(shards, event, values), name=f"checkpoint of step {state.step}", daemon=True
        )
        self.thread.start()
        if not behind:
            self.wait()

    def holds(self, step: int) -> bool:
        """Whether the run folder has a complete checkpoint of `step`, as rank 0 sees it. Collective."""
        self.wait()
        return bool(self.ranks.gather(self.world.is_main and step in layout.steps(self.run_dir))[0])

    def load(self, newest: int, say: Callable[[str], None]) -> TrainState:
        """Go back to the newest sound checkpoint up to step `newest`, once the last one is complete.

        Raises:
            Stop: what became of the last one, see `wait`; or there is none.
        """
        self.wait()
        return load(self.run_dir, self.strategy, self.world, say, newest)

    def copied(self, shards: Sequence[Shard]) -> tuple[list[Shard], Any]:
        """A copy in host memory and the event behind it; the first one is compared with what it was taken from."""
        copies, event = snapshot(shards, self.buffers)
        self.buffers = [copy.tensor for copy in copies]
        if not self.compared_one:
            if event is not None:
                event.synchronize()
            for copy, shard in zip(copies, shards, strict=True):
                assert ranges.equal_bits(copy.tensor, shard.tensor), ranges.key_of(shard)
        return copies, event

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once. Answers without waiting."""
        return self.error is not None

    def wait(self, needed: bool = False) -> None:
        """Until the last checkpoint is complete on all ranks.

        `needed`: the run cannot do without it, whatever `checkpoint.on_full` says.

        Raises:
            UserMistake: it could not be written; the checkpoints before it are untouched.
            NegativeVerdict: the disk does not hold what was written.
        """
        if self.thread is not None:
            heartbeat.mark("checkpoint")
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if needed and self.left_out is not None:
            raise self.left_out

    @property
    def writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _write(self, shards: list[Shard], event: Any, values: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            if event is not None:
                event.synchronize()
            keep, engine = self.run.checkpoint.keep, self.run.strategy.name
            folder = write(self.run_dir, shards, values, self.ranks, keep=keep, engine=engine)
            if not self.compared_one:
                verify_saved(folder, shards, self.ranks)
                self.compared_one = True
            self.seconds = time.monotonic() - started
        except DiskFull as full:
            self._without_room(full)
        except BaseException as error:  # raised again where training waits for it
            self.error = error

    def _without_room(self, full: DiskFull) -> None:
        if self.run.checkpoint.on_full == "skip":
            self.left_out = full
            if self.world.is_main:
                self.say(f"{full} The run goes on without this checkpoint (checkpoint.on_full=skip)")
            return
        self.error = DiskFull(
            f"{full} Then go on from the previous checkpoint with resume={self.run_dir}. A run that should rather go "
            "on without a checkpoint: checkpoint.on_full=skip."
        )


@torch.no_grad()
def snapshot(shards: Sequence[Shard], buffers: Sequence[Tensor] = ()) -> tuple[list[Shard], Any]:
    """Copies in host memory: of one rank's ranges, 12 bytes a parameter under AdamW, divided by the ranks.

    `buffers`: the copies of an earlier call, which are overwritten. From a GPU into pinned memory without waiting.
    Returns the copies, and the event after which they may be read.
    """
    copies, event = [], None
    for shard, buffer in zip_longest(shards, buffers):
        copies.append(dataclasses.replace(shard, tensor=to_host(shard.tensor.detach(), buffer)))
    if any(shard.tensor.is_cuda for shard in shards):
        event = torch.cuda.Event()
        event.record()
    return copies, event


def to_host(tensor: Tensor, buffer: Tensor | None = None) -> Tensor:
    if buffer is not None:
        return buffer.copy_(tensor, non_blocking=True)
    if not tensor.is_cuda:
        return tensor.clone()
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    except RuntimeError:  # no more memory can be pinned
        return tensor.cpu()


def fits_beside(shards: Sequence[Shard]) -> bool:
    """Whether the copies of all ranks on this host take at most half of the host memory that is left."""
    num_bytes = sum(shard.tensor.numel() * shard.tensor.element_size() for shard in shards)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return 2 * num_bytes * neighbours <= available_memory()


def available_memory(control_groups: Path = CONTROL_GROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of host memory that can still be taken: of the machine, and of every control group (v2) around us."""
    least = int(psutil.virtual_memory().available)
    try:
        place = own.read_text().strip().rpartition("::/")[2]
    except OSError:
        return least
    for folder in (control_groups / place, *(control_groups / place).parents):
        try:
            limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():  # else "max"; file pages are given back when memory is asked for
            least = min(least, int(limit) - used + int(counts["inactive_file"]) + int(counts["active_file"]))
    return least
