"""How the cost of a step grows, so that nothing grows faster than it must: `python benchmarks/scaling.py [--out FILE]`.

Along each axis (length, documents in a row, vocabulary, layers, ranks) a few real steps are taken, forward, backward
and update, through distft's trainee and engine on the CPU in fp32, and an exponent is fitted to each cost: the slope of
the least-squares line through the logarithms. Counted, so the same on every machine: operations of matrix products and
attention, calls of operators (the host's work), bytes saved for the backward pass, the most logits that exist at a
time. Measured: seconds that the process was busy, medians. Exit code 3 where an exponent exceeds what it must be by
more than the margin.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import SIZES, Size, lay_out, packed, run_of, step_of, take_step
from timing import arguments_of, clocked, table, write_record
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MARGIN = {"operations": 0.05, "calls": 0.05, "saved": 0.05, "logits": 0.05, "busy": 0.3}
CHUNK = 128  # positions whose logits exist at a time: below the supervised ones of every point


@dataclass(frozen=True)
class Costs:
    """Of one step."""

    operations: float  # of matrix products and attention, as executed
    calls: float  # of operators
    saved: float  # bytes that autograd keeps for the backward pass, without parameters
    logits: float  # bytes of the largest tensor made that is as wide as the vocabulary
    busy: float  # seconds


@dataclass(frozen=True)
class Axis:
    """One size that grows while the others stand still, and the exponent that each cost must not exceed."""

    name: str
    values: tuple[int, ...]
    bounds: dict[str, float]
    point: Callable[[int], tuple[Size, list[int]]]  # the model and the lengths of its documents


class Counted(TorchDispatchMode):
    """Adds up operations and calls, and remembers the largest tensor of logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.operations = self.calls = self.logits = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        self.calls += 1
        self.operations += operations_of(function, arguments, options or {}, made)
        for tensor in torch.utils._pytree.tree_leaves(made):
            wide = isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
            if wide and function._schema.name != "aten::t":  # the weight's own transpose is no new memory
                self.logits = max(self.logits, tensor.numel() * tensor.element_size())
        return made


def operations_of(function: Any, arguments: Any, options: Any, made: Any) -> int:
    name = function._schema.name
    if name in ("aten::addmm", "aten::addmm_"):  # torch's own counter knows nothing of the second
        _, left, right = arguments
        return int(2 * left.shape[0] * left.shape[1] * right.shape[1])
    if name == "aten::mm":
        left, right = arguments
        return int(2 * left.shape[0] * left.shape[1] * right.shape[1])
    if "scaled_dot_product_flash_attention_for_cpu" in name:
        backward = name.endswith("backward")
        query, key = arguments[1:3] if backward else arguments[:2]
        assert query.shape == key.shape or query.shape[2] == key.shape[2]
        pairs = query.shape[2] * (query.shape[2] + 1) // 2  # causal
        return int((5 if backward else 2) * 2 * query.shape[0] * query.shape[1] * query.shape[3] * pairs)
    count = flop_registry.get(function._overloadpacket)
    return int(count(*arguments, **options, out_val=made)) if count else 0


def costs_of(take: Callable[[], Any], weights: list[Tensor], vocabulary: int, repeats: int) -> Costs:
    """The costs of `take`, one step, which is called several times."""
    take()  # optimizer state is made in the first
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    known = {part.untyped_storage().data_ptr() for part in parts}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        take()
    alive.clear()
    with Counted(vocabulary) as counted:
        take()
    busy = statistics.median(clocked(take).busy for _ in range(repeats))
    return Costs(counted.operations, counted.calls, sum(kept.values()), counted.logits, busy)


def measured(size: Size, lengths: list[int], world: Any, repeats: int, strategy: str = "ddp") -> Costs:
    laid = lay_out(run_of(strategy, "full"), world, size)
    laid.strategy.trainee.vocab_chunk = CHUNK
    step = step_of([packed(lengths, size.vocabulary, 0.57)])
    weights = list(laid.strategy.trainee.parameters())
    return costs_of(partial(take_step, laid.strategy, step, world.device), weights, size.vocabulary, repeats)


def exponent(values: tuple[int, ...], costs: list[float]) -> float:
    """Slope of the least-squares line through (log value, log cost)."""
    xs, ys = [math.log(value) for value in values], [math.log(max(cost, 1e-12)) for cost in costs]
    middle, height = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    return sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True)) / spread


def axes(size: Size, tokens: int, most: int) -> list[Axis]:
    """`tokens`: a row's length where it stands still; `most`: how many times the smallest value the largest is."""
    grown = tuple(2**power for power in range(most.bit_length()))
    document = tokens // max(grown)
    several = tuple(2 * times for times in grown)  # a row of one document is not taken apart, and saves less

    def bounds(operations: float, calls: float, saved: float, logits: float, busy: float) -> dict[str, float]:
        return {"operations": operations, "calls": calls, "saved": saved, "logits": logits, "busy": busy}

    return [
        Axis("length, documents alike", tuple(tokens * times for times in grown), bounds(1, 1, 1, 0, 1),
             lambda value: (size, [document] * (value // document))),
        Axis("length of one document", tuple(tokens * times for times in grown), bounds(2, 1, 1, 0, 2),
             lambda value: (size, [value])),  # attention's pairs
        Axis("documents in a row", several, bounds(0, 1, 0, 0, 0), lambda value: (size, [tokens // value] * value)),
        Axis("vocabulary", tuple(size.vocabulary * times // max(grown) for times in grown), bounds(1, 0, 0, 1, 1),
             lambda value: (replace(size, vocabulary=value), [document] * max(grown))),
        Axis("layers", tuple(size.layers * times for times in grown), bounds(1, 1, 1, 0, 1),
             lambda value: (replace(size, layers=value), [document] * max(grown))),
    ]  # fmt: skip


# --- ranks -----------------------------------------------------------------------------------------------------------


def as_rank(rank: int, num_ranks: int, folder: str, strategy: str, size: Size, tokens: int, repeats: int) -> None:
    """One rank's share of the same rows a rank; rank 0 leaves its costs in the folder."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1",
                      GLOO_SOCKET_IFNAME="lo")  # fmt: skip
    import torch.distributed as dist

    from distft.world import join, leave

    torch.set_num_threads(1)
    world = join(dist.FileStore(str(Path(folder) / "store"), num_ranks))
    costs = measured(size, [tokens // 4] * 4, world, repeats, strategy)
    if rank == 0:
        torch.save(asdict(costs), Path(folder) / "costs")
    leave()


def by_ranks(counts: tuple[int, ...], strategy: str, size: Size, tokens: int, repeats: int) -> Iterator[Costs]:
    context = multiprocessing.get_context("spawn")
    for num_ranks in counts:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (num_ranks, folder, strategy, size, tokens, repeats)
            processes = [context.Process(target=as_rank, args=(rank, *arguments)) for rank in range(num_ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                raise SystemExit(f"a rank of {num_ranks} under {strategy} failed")
            yield Costs(**torch.load(Path(folder) / "costs"))


RANK_BOUNDS = {"calls": 0.0, "saved": 0.0, "busy": 0.0}


# --- the verdict -----------------------------------------------------------------------------------------------------


def judged(name: str, values: tuple[int, ...], bounds: dict[str, float], found: list[Costs], clock: bool) -> Any:
    """Rows of the table, and what exceeds its bound."""
    rows, wrong = [], []
    for cost, bound in bounds.items():
        series = [getattr(costs, cost) for costs in found]
        slope = exponent(values, series)
        exceeds = slope > bound + MARGIN[cost] and (clock or cost != "busy")
        rows.append(
            {
                "axis": name,
                "from": values[0],
                "to": values[-1],
                "cost": cost,
                "at most": bound,
                "found": round(slope, 3),
                "verdict": "EXCEEDS" if exceeds else "ok",
                "values": " ".join(f"{value:.4g}" for value in series),
            }
        )
        if exceeds:
            wrong.append(f"{name}: {cost} grows with an exponent of {slope:.2f}, {bound:g} is what it must")
    return rows, wrong


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--size", default="nano", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--times", type=int, default=8, help="how many times the smallest value the largest is")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "fsdp"], help="of the axis of ranks")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.size, arguments.tokens, arguments.times, arguments.repeats = "toy", 512, 2, 1
        arguments.ranks, arguments.strategies = [], []

    from distft.world import join, leave

    size = SIZES[arguments.size]
    world = join()
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for axis in axes(size, arguments.tokens, arguments.times):
        found = [measured(*axis.point(value), world, arguments.repeats) for value in axis.values]
        more, exceeding = judged(axis.name, axis.values, axis.bounds, found, not arguments.toy)
        rows, wrong = rows + more, wrong + exceeding
        print(table(more), flush=True)
    leave()
    counts = tuple(arguments.ranks)
    for strategy in arguments.strategies if counts else ():
        found = list(by_ranks(counts, strategy, size, arguments.tokens, arguments.repeats))
        # One rank has nobody to talk to, so that growth is from two on; more ranks than cores only wait longer.
        several = found[1:] if counts[0] == 1 and len(counts) > 2 else found
        more, exceeding = judged(f"ranks, {strategy}", counts[-len(several) :], RANK_BOUNDS, several, False)
        rows, wrong = rows + more, wrong + exceeding
        print(table(more), flush=True)
    print(*wrong, sep="\n")
    write_record(arguments.out, cases=rows, exceeding=wrong)
    sys.exit(3 if wrong else 0)


if __name__ == "__main__":
    main()
