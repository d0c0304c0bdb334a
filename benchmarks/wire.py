"""Bytes that a step puts on the wire: `python benchmarks/wire.py [--toy] [--interface] [--out FILE]`.

Two measurements, for every strategy, full and LoRA, one micro-batch a step and four:

- *payload*: bytes that a rank hands to collectives in one optimizer step, counted call by call (a dispatch mode sees
  every operation of torch.distributed, whoever calls it), against the least that the strategy can do;
- `--interface` (needs root and iproute2): two network namespaces joined by a veth pair with an MTU of 9000 are two
  hosts with a rank each; the bytes that leave and enter them in a step, against those of the same calls issued bare.
  What the counter did not see would show here.

The payload of a call is the whole tensor that it is about: the tensor reduced, or the one that every rank holds after
a gather. A ring moves (N - 1) / N of that per rank, and 2 (N - 1) / N for an all-reduce: the column *ring*.

Least payload, in values (T trained, P all, E those of the embedding and whatever lies outside blocks and head, H of
the head where it is not tied, B of the blocks, L of the last block; A micro-batches; g and w bytes of a gradient's and
a weight's value):

    ddp     g T                                 one reduction a step
    zero1   g T + w T                           one reduction a step, updated weights gathered once
    zero2   g T A + w T                         gradients are kept in shards, so each micro-batch reduces
    zero3   g T A + w P A                       what is used again within a billion values stays gathered
    fsdp    g T + w (E + H + B + (B - L)) A     blocks are gathered again for backward, all but the last; gradients are
                                                summed where they arise and reduced once
            reshard_after_forward=false:        g T + w P, gathered once a step
            gradient_sync=each:                 g T A in place of g T
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch import nn

    from distft.data.batch import Batch
    from distft.strategy.base import Strategy
    from distft.world import World

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
FSDP_WORDS = (("reshard_after_forward", False), ("gradient_sync", "each"))
BAR = 1.02  # payload against the least
INTERFACE_BAR = 1.05  # bytes at the interface against the same calls bare
INTERFACE = "distft-wire"


@dataclass(frozen=True)
class Size:
    """Llama shapes."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    tokens: int = 64  # of a micro-batch

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )


TOY = Size(hidden=64, layers=3, intermediate=128, vocabulary=512)
WHOLE = Size(hidden=256, layers=4, intermediate=768, vocabulary=8192)


@dataclass(frozen=True)
class Case:
    strategy: str
    tuning: str
    accumulation: int
    words: tuple[tuple[str, Any], ...] = ()  # further knobs of `strategy`


@dataclass(frozen=True)
class Call:
    """One collective as it was issued."""

    kind: str  # the operation's name in torch.ops.c10d
    sizes: tuple[int, ...]  # values of each tensor it is about, whole
    dtype: str
    num_ranks: int
    root: int = 0

    @property
    def payload(self) -> int:
        return sum(self.sizes) * getattr(torch, self.dtype).itemsize

    @property
    def ring(self) -> float:
        """Bytes that a rank sends if the call is done by a ring."""
        passes = 2 if self.kind in ("allreduce_", "allreduce_coalesced_") else 1
        return passes * self.payload * (self.num_ranks - 1) / self.num_ranks


WHOLE_OF: dict[str, Callable[[Any], Any]] = {
    "allreduce_": lambda args: args[0],
    "allreduce_coalesced_": lambda args: args[0],
    "broadcast_": lambda args: args[0],
    "reduce_": lambda args: args[0],
    "allgather_": lambda args: args[0],
    "_allgather_base_": lambda args: args[0],
    "allgather_into_tensor_coalesced_": lambda args: args[0],
    "_reduce_scatter_base_": lambda args: args[1],
    "reduce_scatter_": lambda args: args[1],
    "reduce_scatter_tensor_coalesced_": lambda args: args[1],
    "barrier": lambda args: [],
}
"""Where among an operation's arguments the whole tensor stands."""


class Counter(TorchDispatchMode):
    """Notes every collective issued inside, also those of hooks and of C++ that asks Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::")
            if kind not in WHOLE_OF:
                raise LookupError(f"{func._schema}: WHOLE_OF does not say which argument is the whole tensor")
            tensors = list(tensors_in(WHOLE_OF[kind](args)))
            groups = [value for value in args if isinstance(value, torch.ScriptObject) and hasattr(value, "size")]
            sizes = tuple(tensor.numel() for tensor in tensors)
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "uint8"
            self.calls.append(Call(kind, sizes, dtype, group_size(groups)))
        return func(*args, **(kwargs or {}))


def group_size(groups: list[Any]) -> int:
    for group in groups:
        try:
            return dist.ProcessGroup.unbox(group).size()
        except RuntimeError:
            continue
    return dist.get_world_size()


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


# --- a step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Numbers of values."""

    trained: int
    outside: int  # beside blocks and head; a tied head lies here
    head: int
    blocks: int
    last_block: int


def parts_of(model: Any, layers: list[nn.Module]) -> Parts:
    def values(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    blocks = sum(map(values, layers))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = 0 if tied else values(model.get_output_embeddings())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Parts(trained, values(model) - blocks - head, head, blocks, values(layers[-1]))


def least(case: Case, parts: Parts, gradient: int, weight: int) -> int:
    """Bytes; see the top of this file."""
    every = parts.outside + parts.head + parts.blocks
    again = parts.blocks - parts.last_block
    words = dict(case.words)
    each = case.strategy in ("zero2", "zero3") or words.get("gradient_sync") == "each"
    reductions = case.accumulation if each else 1
    gathered = {
        "ddp": 0,
        "zero1": parts.trained,
        "zero2": parts.trained,
        "zero3": every * case.accumulation,
        "fsdp": every if words.get("reshard_after_forward") is False else (every + again) * case.accumulation,
    }[case.strategy]
    return gradient * parts.trained * reductions + weight * gathered


def build(case: Case, size: Size, world: World) -> tuple[Strategy, Parts]:
    """A trainee of random weights under the engine, through the rooms that a run uses."""
    from transformers import AutoModelForCausalLM

    from distft.config.schema import Run
    from distft.model import tuning
    from distft.model.attention import VARLEN
    from distft.model.load import blocks
    from distft.model.mapping import shapes_of
    from distft.objective.trainee import Trainee
    from distft.optim import make_optimizer
    from distft.strategy import make_strategy
    from distft.weights.store import MemoryWeights

    run = Run()
    run.strategy.name, run.tuning.method, run.precision = case.strategy, case.tuning, "fp32"
    for name, value in case.words:
        setattr(run.strategy, name, value)
    if case.strategy == "zero3":  # parameters of a small model would stay whole on every rank
        run.strategy.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    strategy = make_strategy(run, world, "fp32")
    with strategy.born():
        model = AutoModelForCausalLM.from_config(size.config(), attn_implementation=VARLEN)
    random = MemoryWeights({name: torch.randn(shape) * 0.02 for name, shape in shapes_of(model).items()})
    model, weights = tuning.apply(model, run.tuning, random, run.seed)
    layers = blocks(model)
    parts = parts_of(model, layers)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    trainee = Trainee(model)
    strategy.prepare(trainee, layers, weights, partial(make_optimizer, shapes=shapes, optim=run.optim))
    trainee.train()
    return strategy, parts


def micro_batch(size: Size) -> Batch:
    """Two documents in a packed row, every token trained."""
    from distft.data.batches import lay_packed

    generator = np.random.default_rng(0)
    half = size.tokens // 2
    rows = [(generator.integers(0, size.vocabulary, half), np.ones(half, dtype=bool)) for _ in range(2)]
    return lay_packed(rows, [(0, 0), (0, 1)])


def step(strategy: Strategy, batch: Batch, accumulation: int) -> None:
    from distft.objective.trainee import LossRequest, LossSums

    scale = 1 / (batch.num_supervised * accumulation * dist.get_world_size())
    for index in range(accumulation):
        answer = strategy.forward(LossRequest(batch, scale))
        assert isinstance(answer, LossSums)
        strategy.backward(answer.loss, last=index == accumulation - 1)
    strategy.step(1e-4)


# --- the interface --------------------------------------------------------------------------------------------------


def interface_bytes() -> int:
    """Bytes that this namespace's interface has sent and received so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip().startswith(INTERFACE):
            values = numbers.split()
            return int(values[0]) + int(values[8])
    raise RuntimeError(f"this namespace has no interface {INTERFACE}*")


def bare(calls: list[Call]) -> Callable[[], None]:
    """The same calls with nothing around them; the tensors are made before the clock of bytes starts."""
    num_ranks = dist.get_world_size()
    actions: list[Callable[[], Any]] = []
    for call in calls:
        dtype = getattr(torch, call.dtype)
        for values in call.sizes:
            whole, part = torch.zeros(values, dtype=dtype), torch.zeros(values // num_ranks, dtype=dtype)
            if call.kind.startswith("allreduce"):
                actions.append(partial(dist.all_reduce, whole))
            elif "allgather" in call.kind:
                actions.append(partial(dist.all_gather_into_tensor, whole, part))
            elif "reduce_scatter" in call.kind:
                actions.append(partial(dist.reduce_scatter_tensor, part, whole))
            elif call.kind == "reduce_":
                actions.append(partial(dist.reduce, whole, call.root))
            else:
                actions.append(partial(dist.broadcast, whole, call.root))

    def issue() -> None:
        for action in actions:
            action()

    return issue


def measured(action: Callable[[], Any]) -> int:
    """Bytes at the interface from before `action` to behind it, on this rank."""
    dist.barrier()
    before = interface_bytes()
    action()
    dist.barrier()
    return interface_bytes() - before


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces with a veth pair between them; their names. Gone at the end."""
    names = [f"{INTERFACE}-{os.getpid()}-{side}" for side in range(2)]
    made: list[str] = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ends = [f"{INTERFACE}{side}" for side in range(2)]
        ip("-n", names[0], "link", "add", ends[0], "mtu", "9000", "type", "veth", "peer", "name", ends[1])
        ip("-n", names[0], "link", "set", ends[1], "mtu", "9000", "netns", names[1])
        for side, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.213.0.{side + 1}/24", "dev", ends[side])
            ip("-n", name, "link", "set", ends[side], "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


# --- ranks ----------------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """What a rank does: every case, two steps of which the second is counted (the first one lays out buckets)."""
    from distft.world import join, leave

    told = json.loads((folder / "job.json").read_text())
    cases = [Case(**{**case, "words": tuple(map(tuple, case["words"]))}) for case in told["cases"]]
    size = Size(**told["size"])
    torch.set_num_threads(1)
    world = join(dist.FileStore(str(folder / "store"), int(os.environ["WORLD_SIZE"])))
    answers = []
    for case in cases:
        strategy, parts = build(case, size, world)
        batch = micro_batch(size)
        for _ in range(2):
            step(strategy, batch, case.accumulation)
        with Counter() as counter:
            step(strategy, batch, case.accumulation)
        gradient = 2 if dict(case.words).get("communication") == "bf16" else 4
        payload = sum(call.payload for call in counter.calls)
        answer = {
            **asdict(case),
            "payload": payload,
            "least": least(case, parts, gradient, 4),
            "ring": round(sum(call.ring for call in counter.calls)),
            "calls": summary(counter.calls),
        }
        if told["at_interface"]:
            seen = torch.tensor([measured(partial(step, strategy, batch, case.accumulation))])
            alone = torch.tensor([measured(bare(counter.calls))])
            for value in (seen, alone):
                dist.all_reduce(value)
            answer |= {"interface": int(seen) // world.size, "interface_bare": int(alone) // world.size}
        answers.append(answer)
        del strategy
        dist.barrier()
    if world.is_main:
        (folder / "answers.json").write_text(json.dumps(answers))
    leave()


def summary(calls: list[Call]) -> dict[str, dict[str, int]]:
    """By operation: how many calls, how many bytes."""
    by_kind: dict[str, dict[str, int]] = {}
    for call in calls:
        entry = by_kind.setdefault(call.kind.strip("_"), {"calls": 0, "payload": 0})
        entry["calls"] += 1
        entry["payload"] += call.payload
    return by_kind


def run_ranks(cases: list[Case], size: Size, num_ranks: int, at_interface: bool) -> list[dict[str, Any]]:
    """Start the ranks, each in a namespace of its own if the interface is looked at, and collect the answers."""
    with tempfile.TemporaryDirectory(prefix="distft-wire-") as name:
        folder = Path(name)
        told = {"cases": [asdict(case) for case in cases], "size": asdict(size), "at_interface": at_interface}
        (folder / "job.json").write_text(json.dumps(told))
        if at_interface:
            with two_hosts() as hosts:
                start(folder, [["ip", "netns", "exec", host] for host in hosts], f"{INTERFACE}%d")
        else:
            start(folder, [[]] * num_ranks, "lo")
        return list(json.loads((folder / "answers.json").read_text()))


def start(folder: Path, prefixes: list[list[str]], interface: str) -> None:
    processes = []
    for rank, prefix in enumerate(prefixes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(prefixes)),
            "LOCAL_RANK": "0" if prefix else str(rank),
            "GLOO_SOCKET_IFNAME": interface.replace("%d", str(rank)),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        command = [*prefix, sys.executable, __file__, "--work", str(folder)]
        processes.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")


# --- the report -----------------------------------------------------------------------------------------------------


def table(answers: list[dict[str, Any]]) -> list[str]:
    heads = f"{'strategy':34}{'tuning':8}{'A':>2}{'payload':>13}{'least':>13}{'ratio':>8}{'ring':>13}"
    lines = [f"{heads}  interface / bare"]
    for answer in answers:
        name = " ".join([answer["strategy"], *(f"{key}={value}" for key, value in answer["words"])])
        ratio = answer["payload"] / answer["least"]
        line = f"{name:34}{answer['tuning']:8}{answer['accumulation']:>2}{answer['payload']:>13,}{answer['least']:>13,}"
        line += f"{ratio:>8.3f}{answer['ring']:>13,}"
        if "interface" in answer:
            share = answer["interface"] / answer["interface_bare"]
            line += f"  {answer['interface']:,} / {answer['interface_bare']:,} = {share:.3f}"
        lines.append(line)
    return lines


def missed(answers: list[dict[str, Any]]) -> list[str]:
    """The bars that were not met."""
    wrong = []
    for answer in answers:
        name = f"{answer['strategy']} {answer['tuning']} accumulation {answer['accumulation']}"
        if answer["payload"] > BAR * answer["least"]:
            wrong.append(f"{name}: {answer['payload'] / answer['least']:.3f} x the least payload, {BAR} is the bar")
        if "interface" in answer and answer["interface"] > INTERFACE_BAR * answer["interface_bare"]:
            share = answer["interface"] / answer["interface_bare"]
            wrong.append(f"{name}: {share:.3f} x the bytes of bare calls, {INTERFACE_BAR} is the bar")
    return wrong


def why_no_interface() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    try:
        with two_hosts():
            return ""
    except FileNotFoundError:
        return "iproute2 is not installed"
    except subprocess.CalledProcessError as error:
        return f"ip says: {error.stderr.strip()}"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a model of seconds, for the CI")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--interface", action="store_true", help="two namespaces, a rank in each; needs root")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    at_interface = arguments.interface
    if at_interface and (reason := why_no_interface()):
        print(f"No look at the interface: {reason}")
        at_interface = False
    num_ranks = 2 if at_interface else arguments.ranks
    cases = [Case(s, t, a) for s in arguments.strategies for t in ("full", "lora") for a in (1, 4)]
    cases += [Case(s, "full", 1, (("communication", "bf16"),)) for s in arguments.strategies]
    if "fsdp" in arguments.strategies:
        cases += [Case("fsdp", "full", 4, (word,)) for word in FSDP_WORDS]
    size = TOY if arguments.toy else WHOLE
    answers = run_ranks(cases, size, num_ranks, at_interface)
    print(f"{num_ranks} ranks, fp32, {size}\n" + "\n".join(table(answers)))
    wrong = missed(answers)
    print(*wrong, sep="\n")
    if arguments.out:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/wire.py", *sys.argv[1:]]),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": versions(),
            "ranks": num_ranks,
            "size": asdict(size),
            "cases": answers,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(3 if wrong else 0)


if __name__ == "__main__":
    main()
