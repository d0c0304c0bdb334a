"""What the benchmarks of distft's own parts share: made-up models and batches, and engines laid out for them.

Imported by scripts beside it, so that each runs as `python benchmarks/<name>.py`, also where distft is not installed
and neither Hydra nor DeepSpeed nor datasets are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import timing  # noqa: F401  (from here on distft is found where it is not installed)
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from distft.config.schema import Run
    from distft.data.batch import Batch, Step
    from distft.perf import Cost
    from distft.strategy.base import Strategy
    from distft.world import World

MEDIAN_LENGTH, SPREAD = 130.0, 0.76  # tokens of a chat row, and the deviation of its logarithm: 99 % are below 800
SHORTEST = 16


@dataclass(frozen=True)
class Size:
    """A Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True


SIZES = {
    "toy": Size(32, 2, 2, 1, 64, 256),
    "nano": Size(128, 4, 4, 2, 384, 32_000),
    "micro": Size(384, 8, 6, 2, 1152, 32_000),
    "1b": Size(2048, 16, 32, 8, 8192, 128_256),  # Llama 3.2 1B
    "3b": Size(3072, 28, 24, 8, 8192, 128_256),  # Llama 3.2 3B
    "8b": Size(4096, 32, 32, 8, 14_336, 128_256, tied=False),  # Llama 3.1 8B
}


def configuration(size: Size) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.hidden // size.heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied,
        max_position_embeddings=131_072,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


class RandomWeights:
    """Made on the device when they are read: matrices with a spread of 0.02, vectors of ones. See weights/store.py."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.device = device

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        shape = self.shapes[name]
        length = torch.Size(shape).numel() - start if length is None else length
        if len(shape) < 2:
            return torch.ones(length, device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.names().index(name))
        return torch.empty(length, device=self.device).normal_(std=0.02, generator=generator)


def run_of(
    strategy: str,
    tuning: str,
    precision: str = "fp32",
    activation: str = "none",
    compiled: bool = False,
    kernels: str = "auto",
) -> Run:
    from distft.config.schema import Run

    run = Run()
    run.model.compile, run.model.kernels = compiled, kernels
    run.strategy.name, run.tuning.method, run.precision, run.activation.mode = strategy, tuning, precision, activation
    run.optim.lr, run.tuning.lora_rank, run.tuning.target = 1e-4, 16, "all-linear"
    return run


@dataclass
class Laid:
    """A trainee under its engine, as `distft train` lays it out."""

    strategy: Strategy
    cost: Cost
    notes: list[str]
    num_trained: int


def lay_out(run: Run, world: World, size: Size, strategy: Any = None, fused: bool = True) -> Laid:
    """The same calls in the same order as `Job.assemble` of distft/verbs/train.py, on a model that lies in no folder.

    strategy: an engine other than the one that `run` names. fused: kernels and adapters as a run would have them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from distft.model import activation, adapters, kernels, tuning
    from distft.model.load import blocks, restore_ties
    from distft.model.varlen import VARLEN
    from distft.objective.trainee import Trainee, chunk_on
    from distft.optim import make_optimizer
    from distft.perf import cost_of
    from distft.strategy import make_strategy

    strategy = strategy or make_strategy(run, world, run.precision)
    with strategy.born(), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(
            configuration(size), attn_implementation=VARLEN, dtype=torch.float32
        )
    restore_ties(model)
    model, weights = tuning.apply(model, run.tuning, RandomWeights(model, world.device), run.seed)
    layers = blocks(model)
    notes = []
    if fused:
        notes += adapters.apply(model, run.model.compile)
        notes += [] if run.model.compile else kernels.apply(model, run.model.kernels, world.device)
    if run.model.compile:
        from distft.model import compile

        compile.enable(layers, world.device)
    activation.enable(model, layers, run.activation.mode)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    cost = cost_of(model, layers)
    trainee = Trainee(model, chunk_on(world.device, model.config))
    trainee.train()
    strategy.prepare(trainee, layers, weights, partial(make_optimizer, shapes=shapes, optim=run.optim))
    return Laid(strategy, cost, notes, num_trained)


# --- batches ---------------------------------------------------------------------------------------------------------


def long_tailed(num_tokens: int, seed: int, median: float = MEDIAN_LENGTH) -> list[int]:
    """Lengths of documents that fill one packed row exactly; their logarithms are normal."""
    import numpy

    random, lengths = numpy.random.default_rng(seed), []
    while num_tokens > 0:
        drawn = max(SHORTEST, int(median * numpy.exp(SPREAD * random.standard_normal())))
        lengths.append(min(drawn, num_tokens))
        num_tokens -= lengths[-1]
    return lengths


def packed(lengths: list[int], vocabulary: int, supervised: float, seed: int = 0, pinned: bool = False) -> Batch:
    """One packed row of random tokens; the last `supervised` share of each document is trained."""
    from distft.data.batch import Batch

    generator = torch.Generator().manual_seed(seed)
    total, starts = sum(lengths), [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = torch.tensor(
        [
            position
            for start, length in zip(starts, lengths, strict=False)
            for position in range(start + length - 1 - max(1, round(supervised * (length - 1))), start + length - 1)
            if position >= start
        ],
        dtype=torch.int64,
    )
    input_ids = torch.randint(vocabulary, (1, total), generator=generator)
    batch = Batch(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_length=max(lengths),
        positions=positions,
        targets=input_ids[0, positions + 1],
        sources=torch.zeros_like(positions),
        num_tokens=total,
        lengths=tuple(lengths),
    )
    if not pinned:
        return batch
    fields = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return Batch(**{**vars(batch), **fields})


def step_of(batches: Iterable[Batch]) -> Step:
    from distft.data.batch import Step

    batches = tuple(batches)
    supervised, tokens = sum(batch.num_supervised for batch in batches), sum(batch.num_tokens for batch in batches)
    return Step(0, batches, supervised, tokens, (supervised,), (tokens,), 0)


def take_step(strategy: Strategy, step: Step, device: torch.device, lr: float = 1e-4) -> Tensor:
    """Forward, backward and update of one global batch, as `Fit.step` calls them. Returns the loss, on the device."""
    from distft.objective.trainee import LossRequest

    total = torch.zeros((), device=device)
    for index, batch in enumerate(step.micro_batches):
        answer: Any = strategy.forward(LossRequest(batch.to(device), 1 / max(1, step.num_supervised)))
        strategy.backward(answer.loss, last=index == len(step.micro_batches) - 1)
        total += answer.nll[0]
    strategy.step(lr)
    return total / max(1, step.num_supervised)
