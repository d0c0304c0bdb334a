"""What watching over a step adds to it: `python benchmarks/overheads.py [--toy]`; under `torchrun` with its reduction.

Every row is the median of 10,000 isolated calls of what one training step does, in microseconds. On one rank the guard
of the loss is what the host and the device compute; on several (`torchrun --nproc-per-node 2 …`) also the reduction of
its one number, 4 bytes, which in a step goes on behind the backward pass and here is waited for. The heartbeat's row is
all marks of a step of one micro-batch, with the thread beside them at work.

A second table is the speed of XXH3-128 in GB/s (10^9 bytes): of tensors in memory, as checkpoints are hashed when they
are written, and of a file that the kernel holds in memory, as they are verified. The exit code is 1 where a bar is
missed: heartbeat and the dearest guard together, on one rank, and the hashing of tensors.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from measure import run_of
from timing import arguments_of, table, write_record

from distft import heartbeat
from distft.checkpoint.state import TrainState
from distft.data.batch import Step
from distft.guard import Guard
from distft.pulse import Pulse
from distft.weights.write import hash_file
from distft.world import World, join, leave

BAR = 200.0  # microseconds a step, heartbeat and guard together
HASH_BAR = 5.0  # GB/s of tensors in memory
CALLS = 10_000

Call = Callable[[], object]


def guard_of(spike: str) -> Callable[[World], Call]:
    """All that a step does for `guard.spike=<spike>`: the loss compared, its numbers noted, those before judged."""

    def prepared(world: World) -> Call:
        run = run_of("ddp", "full")
        run.guard.spike = spike
        guard, state = Guard(run, world), TrainState()
        guard.restore([2.0 + number % 7 / 100 for number in range(run.guard.spike_window)])
        norm, nll = torch.tensor(1.0, device=world.device), torch.tensor([200.0 / world.size, 0.0], device=world.device)
        step = Step(0, (), 100, 100, (100,), (100,), 0)

        def call() -> None:
            guard.reduce(nll[:-1])
            guard.compare(100)
            guard.settle(state, lambda step: [])
            guard.note(norm, step)

        return call

    return prepared


def marks_of_a_step(world: World) -> Call:
    """Those of a step of one micro-batch that also writes a record."""

    def call() -> None:
        heartbeat.mark("data", 1)
        for phase in ("forward", "backward", "optimizer step", "record", "agreement"):
            heartbeat.mark(phase)

    return call


ROWS: dict[str, Callable[[World], Call]] = {
    "heartbeat": marks_of_a_step,
    "guard of the loss: none": guard_of("none"),
    "guard of the loss: warn": guard_of("warn"),
    "guard of the loss: skip": guard_of("skip"),
}


def median_of(call: Call, calls: int) -> float:
    """Microseconds."""
    for _ in range(calls // 10):
        call()
    taken = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - started)
    return statistics.median(taken) / 1000


def speeds(num_bytes: int, repeats: int, folder: Path) -> dict[str, float]:
    """GB/s of each way to hash, medians."""
    path, tensor = folder / "tensor", torch.randn(num_bytes // 4)
    data: Any = tensor.numpy()
    path.write_bytes(data)
    calls: dict[str, Call] = {
        "tensors in memory": lambda: xxhash.xxh3_128(data).hexdigest(),
        "a file in memory": lambda: hash_file(path),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append(num_bytes / 1e9 / (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in taken.items()}


def main() -> int:
    given = arguments_of(__doc__).parse_args()
    world = join()
    torch.set_num_threads(1)
    calls, num_bytes, repeats = (200, 1 << 20, 2) if given.toy else (CALLS, 1 << 28, 9)
    with tempfile.TemporaryDirectory() as folder, Pulse(Path(folder), world.rank, world.size):
        taken = {name: median_of(prepared(world), calls) for name, prepared in ROWS.items()}
        hashed = speeds(num_bytes, repeats, Path(folder))
    rows = [{"what": name, "µs": round(median, 1)} for name, median in taken.items()]
    hashing = [{"XXH3-128 of": name, "GB/s": round(speed, 1)} for name, speed in hashed.items()]
    together = taken.pop("heartbeat") + max(taken.values())
    exceeding = []
    if world.size == 1 and together > BAR:
        exceeding.append(f"heartbeat and guard take {together:.0f} µs a step, {BAR:g} are allowed")
    if hashed["tensors in memory"] < HASH_BAR:
        exceeding.append(f"tensors are hashed at {hashed['tensors in memory']:.1f} GB/s, {HASH_BAR:g} are asked for")
    if world.is_main:
        print(table(rows))
        print(f"{calls:,} calls each on each of {world.size} ranks; {BAR:g} µs a step are allowed\n")
        print(table(hashing), *exceeding, sep="\n")
        write_record(given.out, rows=rows, calls=calls, ranks=world.size, bar=BAR, hashing=hashing, exceeding=exceeding)
    leave()
    return 1 if exceeding and not given.toy else 0


if __name__ == "__main__":
    sys.exit(main())
