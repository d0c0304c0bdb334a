"""What an engine costs over the same loop without one: `python benchmarks/engines.py [--out FILE] [--toy]`.

One process, one rank, fp32 on the CPU: for each model and tuning the same packed rows through ddp, zero2 and fsdp and
through a bare loop of the same trainee (loss.backward, clip_grad_norm_, fused AdamW), in turn, medians. The ratio is by
seconds that the process was busy, since other work on a machine disturbs the clock more. Exit code 3 where an engine
costs more than BAR. `--profile` names the functions and operators in which an engine spends more than the bare loop.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
from collections import Counter
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from measure import SIZES, lay_out, long_tailed, packed, run_of, step_of, take_step
from timing import arguments_of, interleaved, table, write_record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BAR = 1.10
ENGINES = ("ddp", "zero2", "fsdp")


class Bare:
    """No engine: what a loop on one rank needs and no more."""

    def __init__(self, clip: float) -> None:
        self.clip = clip

    def born(self) -> AbstractContextManager[Any]:
        return torch.device("meta")

    def prepare(self, trainee: Any, blocks: list[nn.Module], weights: Any, make_optimizer: Any) -> None:
        from distft.model.load import finish_buffers
        from distft.strategy.birth import empty_on, read_weights

        self.trainee = trainee
        empty_on(trainee, torch.device("cpu"))
        finish_buffers(trainee.model, torch.device("cpu"))
        read_weights(trainee.model, weights)
        trained = [(name, weight) for name, weight in trainee.model.named_parameters() if weight.requires_grad]
        self.weights = [weight for _, weight in trained]
        self.optimizer = make_optimizer(trained)

    def forward(self, request: Any) -> Any:
        return self.trainee(request)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class Operators(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.calls[function._schema.name] += 1
        return function(*arguments, **(options or {}))


def profile(call: Any, bare: Any) -> list[str]:
    """Where `call` spends more than `bare`: own seconds of Python functions, and calls of operators."""
    spent: list[dict[Any, float]] = []
    counted: list[Counter[str]] = []
    for one in (call, bare):
        profiler = cProfile.Profile()
        profiler.runcall(one)
        stats: Any = pstats.Stats(profiler)
        spent.append({key: value[2] for key, value in stats.stats.items()})
        with Operators() as operators:
            one()
        counted.append(operators.calls)
    more = {key: own - spent[1].get(key, 0.0) for key, own in spent[0].items()}
    lines = [
        f"    {1e3 * more[key]:8.2f} ms more in {key[2]} ({'/'.join(key[0].split('/')[-2:])}:{key[1]})"
        for key in sorted(more, key=lambda key: -more[key])[:8]
    ]
    calls = (counted[0] - counted[1]).most_common(8)
    return [*lines, "    calls more: " + ", ".join(f"{name} {number}" for name, number in calls)]


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["nano", "micro"], choices=list(SIZES))
    parser.add_argument("--tunings", nargs="+", default=["full", "lora"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.models, arguments.repeats, arguments.length = ["toy"], 1, 128

    from distft.world import join, leave

    world = join()
    rows, wrong = [], []
    for model in arguments.models:
        for tuning in arguments.tunings:
            size = SIZES[model]
            step = step_of(packed(long_tailed(arguments.length, seed), size.vocabulary, 0.57, seed) for seed in (0, 1))
            bare = lay_out(run_of("ddp", tuning), world, size, strategy=Bare(1.0)).strategy
            calls: dict[str, Any] = {"bare": partial(take_step, bare, step, world.device)}
            losses = {"bare": float(calls["bare"]())}
            for engine in arguments.engines:
                calls[engine] = partial(
                    take_step, lay_out(run_of(engine, tuning), world, size).strategy, step, world.device
                )
                losses[engine] = float(calls[engine]())
            if max(losses.values()) - min(losses.values()) > 1e-4:
                wrong.append(f"{model} {tuning}: the losses differ: {losses}")
            seconds, first = interleaved(calls, arguments.repeats), len(rows)
            for name, taken in seconds.items():
                ratio = taken.busy / seconds["bare"].busy
                rows.append(
                    {
                        "model": model,
                        "tuning": tuning,
                        "engine": name,
                        "busy ms": round(1e3 * taken.busy, 1),
                        "clock ms": round(1e3 * taken.wall, 1),
                        "ratio": round(ratio, 3),
                        "by the clock": round(taken.wall / seconds["bare"].wall, 3),
                    }
                )
                if ratio > BAR and not arguments.toy:
                    wrong.append(f"{model} {tuning}: {name} costs {ratio:.2f} x the bare loop, {BAR:.2f} are allowed")
            print(table(rows[first:]), flush=True)
            for name in arguments.engines:
                if arguments.profile:
                    print(f"{model} {tuning} {name}:", *profile(calls[name], calls["bare"]), sep="\n")
    print(*wrong, sep="\n")
    write_record(arguments.out, cases=rows, exceeding=wrong)
    leave()
    sys.exit(3 if wrong else 0)


if __name__ == "__main__":
    main()
