"""What watching over a step adds to it: `python benchmarks/overheads.py [--toy]`; under `torchrun` with its reduction.

Every row is the median of 10,000 isolated calls of what one training step does, in microseconds. On one rank the guard
of the loss is what the host and the device compute; on several (`torchrun --nproc-per-node 2 …`) also the reduction of
its one number, 4 bytes, for which gloo makes the host wait and NCCL does not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from measure import arguments_of, run_of, table, write_record

from distft.checkpoint.state import TrainState
from distft.data.batch import Step
from distft.guard import Guard
from distft.world import World, join, leave

BAR = 200.0  # microseconds a step, heartbeat and guard together
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
            guard.compare(nll[:-1].sum(), 100)
            guard.settle(state, lambda step: [])
            guard.note(norm, step)

        return call

    return prepared


ROWS: dict[str, Callable[[World], Call]] = {
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


def main() -> int:
    given = arguments_of(__doc__).parse_args()
    world = join()
    torch.set_num_threads(1)
    calls = 200 if given.toy else CALLS
    rows = [{"what": name, "µs": round(median_of(prepared(world), calls), 1)} for name, prepared in ROWS.items()]
    if world.is_main:
        print(table(rows))
        print(f"{calls:,} calls each on each of {world.size} ranks; {BAR:g} µs a step are allowed")
        write_record(given.out, rows=rows, calls=calls, ranks=world.size, bar=BAR)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
