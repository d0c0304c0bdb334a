"""Tokens a second on one GPU, and as a share of what its matrix products reach: `python benchmarks/gpu.py`.

For Llama shapes of 1B, 3B and 8B with random weights, full and LoRA r=16 on all linear layers, packed bins of 4,096
tokens (`--micro-size` of them a step) whose documents are chat rows of long-tailed lengths: median seconds of a step,
tokens a second, model FLOPs a second (distft/perf.py: recomputation is not counted), and the rate of bf16 products of
this model's own shapes, measured in the same run, which 100 % would be. `--heads` measures the ways of the head's loss
at these shapes, `--profile` says where the time goes. Needs torch and transformers, and peft for LoRA. What does not
fit is said so.
`--toy --device cpu` runs all of it at toy size on the CPU, to see that it works.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from measure import MEDIAN_LENGTH, SIZES, Laid, Size, lay_out, long_tailed, packed, run_of, step_of, take_step
from timing import arguments_of, clocked, table, write_record

from distft.model.head_trial import Shape, settle, timed, trial
from distft.model.loss import Tail
from distft.perf import attended_pairs, memory
from distft.world import World, join, leave

if TYPE_CHECKING:
    from distft.data.batch import Batch


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(size: Size, num_tokens: int, supervised: int, device: torch.device, repeats: int) -> float:
    """Operations a second of bf16 products at the shapes of one forward pass of this model, all taken together."""
    head_size = size.hidden // size.heads
    shapes = [
        (num_tokens, size.hidden, size.heads * head_size, 2 * size.layers),  # queries, output
        (num_tokens, size.hidden, size.key_heads * head_size, 2 * size.layers),  # keys, values
        (num_tokens, size.hidden, size.intermediate, 2 * size.layers),  # gate, up
        (num_tokens, size.intermediate, size.hidden, size.layers),  # down
        (max(1, supervised), size.hidden, size.vocabulary, 1),  # head
    ]
    operations = seconds = 0.0
    for rows, inner, columns, times in shapes:
        left = torch.randn(rows, inner, device=device).bfloat16()
        right = torch.randn(columns, inner, device=device).bfloat16()
        product = partial(torch.mm, left, right.T)
        taken = statistics.median(many_times(product, rows * inner * columns, device, repeats))
        operations += times * 2.0 * rows * inner * columns
        seconds += times * taken
    return operations / seconds


def many_times(product: Callable[[], Any], size: int, device: torch.device, repeats: int) -> list[float]:
    """Seconds of one product of `size` multiply-adds. On a GPU many of them are one graph, which the host starts."""
    for _ in range(3):
        product()
    if device.type == "cpu":
        return [timed(product, device) for _ in range(repeats)]
    number = max(4, 2 * 10**12 // size)
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            product()
    graph.replay()
    return [timed(graph.replay, device) / number for _ in range(repeats)]


def formula(laid: Laid, lengths: list[int], supervised: int) -> str:
    """The operations of a step, written out."""
    cost = laid.cost
    terms = [f"{cost.per_token:.6g} x {sum(lengths)} tokens", f"{cost.per_supervised:.6g} x {supervised} supervised"]
    terms += [f"{kind.per_pair:.6g} x {attended_pairs(lengths, kind.window)} pairs" for kind in cost.attention]
    return " + ".join(terms) + f" = {cost.of_documents(lengths, supervised):.6g}"


def micro_batch(seed: int, size: Size, arguments: Any, device: torch.device) -> Batch:
    """One row of as many bins of `--length` as `--micro-size` says: as a run lays out a micro-batch of packed bins."""
    bins = range(arguments.micro_size * seed, arguments.micro_size * (seed + 1))
    lengths = [length for bin in bins for length in long_tailed(arguments.length, bin, arguments.median)]
    return packed(lengths, size.vocabulary, arguments.supervised, seed, device.type == "cuda")


def measured(name: str, tuning: str, world: World, arguments: Any) -> dict[str, Any]:
    """One case; raises torch.OutOfMemoryError where it does not fit."""
    size, device = SIZES[name], world.device
    precision = "bf16" if device.type == "cuda" else "fp32"
    run = run_of(arguments.engine, tuning, precision, arguments.activation, arguments.compile, arguments.kernels)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    laid = lay_out(run, world, size)
    trainee = laid.strategy.trainee
    trainee.vocab_chunk = arguments.chunk or trainee.vocab_chunk
    tokens_a_pass = arguments.length * arguments.micro_size
    with TemporaryDirectory() as cache:
        laid.notes += settle(trainee, arguments.head, world, precision, tokens_a_pass, False, Path(cache))
    steps = [step_of([micro_batch(seed, size, arguments, device)]) for seed in range(4)]
    for number in range(arguments.warm_up):
        take_step(laid.strategy, steps[number % 4], device)
    wait(device)

    seconds: list[float] = []
    losses: list[torch.Tensor] = []

    def four_steps() -> None:
        losses.extend(take_step(laid.strategy, step, device) for step in steps)
        wait(device)

    for _ in range(arguments.repeats):
        seconds.append(clocked(four_steps).wall / len(steps))
    tokens = sum(step.num_tokens for step in steps) / len(steps)
    supervised = sum(step.num_supervised for step in steps) / len(steps)
    operations = sum(laid.cost.of_step(step) for step in steps) / len(steps)
    taken = statistics.median(seconds)
    rate = product_rate(size, int(tokens), int(supervised), device, arguments.repeats)
    lengths = list(steps[0].micro_batches[0].lengths)
    print(f"{name} {tuning}: FLOPs of the first step: {formula(laid, lengths, steps[0].num_supervised)}")
    print(*(f"  {note}" for note in laid.notes), sep="\n")
    if arguments.profile:
        profile(partial(take_step, laid.strategy, steps[0], device), device)
    return {
        "model": name,
        "tuning": tuning,
        "micro size": arguments.micro_size,
        "ms a step": round(1e3 * taken, 2),
        "tokens/s": round(tokens / taken),
        "supervised/s": round(supervised / taken),
        "TFLOP/s": f"{operations / taken / 1e12:.4g}",
        "products TFLOP/s": f"{rate / 1e12:.4g}",
        "share": f"{operations / taken / rate:.1%}",
        "peak GiB": round(memory(device)["memory_peak_bytes"] / 2**30, 2),
        "documents": len(lengths),
        "loss": f"{float(losses[0]):.3f} -> {float(losses[-1]):.3f}",
    }


def profile(call: Any, device: torch.device) -> None:
    """Which operators the time of a step goes to."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as seen:
        call()
        wait(device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))


def heads(names: list[str], device: torch.device, arguments: Any) -> list[dict[str, Any]]:
    """Milliseconds of each way of the head's loss, by chunk; and of Liger's own function, which waits for the host."""
    rows = []
    for name in names:
        size = SIZES[name]
        positions = round(arguments.supervised * arguments.length)
        for trained in (True, False):
            for chunk in arguments.chunks:
                dtype = "bfloat16" if device.type == "cuda" else "float32"
                shape = Shape(positions, size.hidden, size.vocabulary, dtype, trained, chunk, False)
                found = trial(shape, Tail(), device, arguments.repeats)
                rows.append({"model": name, "head": "trained" if trained else "frozen", "chunk": chunk})
                for way, finding in found.items():
                    rows[-1][way] = finding.why_not if finding.milliseconds is None else round(finding.milliseconds, 2)
            rows[-1]["liger as shipped"] = liger_as_shipped(shape, device, arguments.repeats)
    for row in rows:
        row.setdefault("liger as shipped", "")
    return rows


def liger_as_shipped(shape: Shape, device: torch.device, repeats: int) -> Any:
    if device.type == "cpu":
        return "needs a GPU"
    try:
        from liger_kernel.ops import fused_linear_cross_entropy_forward
    except ImportError as error:
        return f"cannot: {error}"
    hidden = torch.randn(shape.positions, shape.dim, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(shape.vocabulary, shape.dim, device=device, dtype=torch.bfloat16).requires_grad_(shape.trained)
    targets = torch.randint(shape.vocabulary, (shape.positions,), device=device)
    with torch.no_grad():
        call = partial(fused_linear_cross_entropy_forward, hidden, weight, targets, reduction="sum",
                       accum_dtype=torch.float32)  # fmt: skip
        call()
        return round(1e3 * statistics.median(timed(call, device) for _ in range(repeats)), 2)


def options() -> Any:
    parser = arguments_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["1b", "3b", "8b"], choices=list(SIZES))
    parser.add_argument("--tunings", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--engine", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--activation", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "liger", "none"], help="model.kernels of a run")
    parser.add_argument("--compile", action="store_true", help="every block, as model.compile=true does")
    parser.add_argument("--micro-size", type=int, default=1, help="bins of a micro-batch, which is a step")
    parser.add_argument("--head", default="auto", choices=["auto", "chunked", "liger", "torch"])
    parser.add_argument("--chunk", type=int, default=0, help="positions whose logits exist at a time; 0: as in a run")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 2048], help="of --heads")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--median", type=float, default=MEDIAN_LENGTH, help="of the documents' lengths")
    parser.add_argument("--supervised", type=float, default=0.57, help="share of the tokens that is trained")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.models, arguments.length, arguments.repeats, arguments.warm_up = ["toy"], 128, 1, 1
        arguments.chunks, arguments.median = [32], 30.0
    return arguments


def main() -> None:
    arguments = options()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("No CUDA GPU here; --toy --device cpu runs the same code on the CPU.")
    world = join()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in arguments.models:
        for tuning in arguments.tunings:
            try:
                rows.append(measured(name, tuning, world, arguments))
            except torch.OutOfMemoryError as error:
                left_out.append(f"{name} {tuning} does not fit: {str(error).splitlines()[0]}")
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    if rows:
        print(table(rows))
    print(*left_out, sep="\n")
    of_heads = heads(arguments.models, world.device, arguments) if arguments.heads else []
    if of_heads:
        print(table(of_heads))
    write_record(arguments.out, cases=rows, left_out=left_out, heads=of_heads)
    leave()


if __name__ == "__main__":
    main()
