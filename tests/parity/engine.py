"""What a rank does in a parity test: build the real trainee, lay it out by the real engine, take the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distft.config.schema import Run
from distft.data.batch import Batch
from distft.model.activation import enable
from distft.model.attention import VARLEN
from distft.model.load import blocks
from distft.objective.trainee import LossRequest, LossSums, Trainee
from distft.optim import make_optimizer
from distft.strategy import make_strategy
from distft.strategy.base import Strategy
from distft.weights.store import MemoryWeights, Overlay, Weights
from distft.world import World, sum_over
from tests.parity.reference import (
    LORA_ALPHA,
    LORA_RANK,
    Document,
    Outcome,
    Recipe,
    adapter_weights,
    base_weights,
    config,
    documents,
)

NUM_SOURCES = 2


@dataclass(frozen=True)
class Case:
    """How a recipe is computed."""

    strategy: str
    accumulation: int = 1
    recipe: Recipe = field(default_factory=Recipe)
    layout: str = "rows"  # one document a row; "packed": all in one; "leaking": in one, with no boundaries told
    precision: str = "fp32"
    checkpointing: str = "none"
    mean_of_means: bool = False  # a wrong scale, as a negative control: every micro-batch by its own count
    wrong_factor: float = 1.0  # another one: all gradients times this
    poisoned: tuple[int, int] | None = None  # (step, rank) whose loss is not a number
    kept: bool = True  # False: gradients are dropped
    options: tuple[tuple[str, Any], ...] = ()  # further knobs of `strategy`
    backend: str = ""  # torch.compile of every block by this one
    target: str = "all-linear"  # layers that get adapters


def run_of(case: Case) -> Run:
    run = Run()
    recipe = case.recipe
    run.strategy.name = case.strategy
    run.strategy.shard_size = 2
    for name, value in case.options:
        setattr(run.strategy, name, value)
    if case.strategy.startswith("zero3"):  # tiny parameters would stay whole on every rank, and nothing be partitioned
        run.strategy.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    run.precision = case.precision
    run.optim.name, run.optim.lr, run.optim.weight_decay = recipe.optimizer, recipe.lr, recipe.weight_decay
    run.optim.betas, run.optim.eps, run.optim.clip = recipe.betas, recipe.eps, recipe.clip
    run.tuning.method, run.tuning.lora_rank, run.tuning.lora_alpha = recipe.tuning, LORA_RANK, LORA_ALPHA
    run.tuning.target = case.target
    run.activation.mode = case.checkpointing
    return run


def prepared(world: World, case: Case, weights: Weights | None = None) -> Strategy:
    """The trainee of a case under its engine, with the weights of the reference if no others are given."""
    from transformers import AutoModelForCausalLM

    run = run_of(case)
    strategy = make_strategy(run, world, case.precision)
    with strategy.born():
        attention = "eager" if case.layout == "rows" else VARLEN
        model = AutoModelForCausalLM.from_config(config(case.recipe.tied), attn_implementation=attention)
    weights = weights or MemoryWeights(base_weights(case.recipe.tied))
    if case.recipe.tuning == "lora":
        from distft.model import adapters, tuning

        model, adapted = tuning.apply(model, run.tuning, weights, seed=0)
        assert adapters.apply(model, bool(case.backend)) == []
        weights = Overlay(adapted, MemoryWeights(adapters_by_peft_name(case.recipe)))
    if case.backend:
        from distft.model import compile

        compile.enable(blocks(model), world.device, case.backend)
    else:
        from distft.model import kernels

        notes = kernels.apply(model, "auto", world.device)
        assert notes == [] or world.device.type == "cuda"  # where it says which fused ones it took
    enable(model, blocks(model), case.checkpointing)
    trainee = Trainee(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    strategy.prepare(trainee, blocks(model), weights, partial(make_optimizer, shapes=shapes, optim=run.optim))
    trainee.train()
    return strategy


def adapters_by_peft_name(recipe: Recipe) -> dict[str, Tensor]:
    named = {}
    for name, (a, b) in adapter_weights(recipe.tied).items():
        module = name.removesuffix(".weight")
        named[f"base_model.model.{module}.lora_A.default.weight"] = a
        named[f"base_model.model.{module}.lora_B.default.weight"] = b
    return named


def reference_name(name: str) -> str:
    """The reference's name of an engine's parameter."""
    name = name.removeprefix("base_model.model.")
    for letter in "AB":
        name = name.replace(f".lora_{letter}.default.weight", f".weight.{letter}")
    return name


def rows(group: Sequence[Document]) -> Batch:
    """One document a row, padded on the right with token 1."""
    length = max(len(document.tokens) for document in group)
    input_ids = torch.ones(len(group), length, dtype=torch.int64)
    mask = torch.zeros(len(group), length, dtype=torch.bool)
    for row, document in enumerate(group):
        input_ids[row, : len(document.tokens)] = torch.tensor(document.tokens)
        mask[row, : len(document.tokens)] = True
    targets = [
        (row * length + column - 1, document.tokens[column], document.source)
        for row, document in enumerate(group)
        for column, trained in enumerate(document.trained)
        if trained
    ]
    positions, tokens, sources = (torch.tensor(values) for values in zip(*targets, strict=True))
    position_ids = torch.arange(length).expand(len(group), length)
    longest = max(len(document.tokens) for document in group)
    num_tokens = int(mask.sum())
    return Batch(input_ids, position_ids, mask, None, longest, positions, tokens, sources, num_tokens)


def packed(group: Sequence[Document]) -> Batch:
    """All documents in one row."""
    lengths = [len(document.tokens) for document in group]
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    input_ids = torch.tensor([[token for document in group for token in document.tokens]])
    position_ids = torch.tensor([[position for length in lengths for position in range(length)]])
    targets = [
        (start + column - 1, document.tokens[column], document.source)
        for start, document in zip(starts, group, strict=False)
        for column, trained in enumerate(document.trained)
        if trained
    ]
    positions, tokens, sources = (torch.tensor(values) for values in zip(*targets, strict=True))
    return Batch(
        input_ids,
        position_ids,
        None,
        torch.tensor(starts, dtype=torch.int32),
        max(lengths),
        positions,
        tokens,
        sources,
        sum(lengths),
        lengths=tuple(lengths),
    )


def leaking(group: Sequence[Document]) -> Batch:
    """As `packed`, but as if it were one document: the layout that a wrong attention would amount to."""
    batch = packed(group)
    length = batch.num_tokens
    return replace(batch, cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_length=length, lengths=(length,))


def micro_batches(step: Sequence[Document], world: World, case: Case) -> list[Batch]:
    """This rank's share of a step in `accumulation` micro-batches; empty ones where it runs short."""
    most = -(-len(step) // world.data_size)
    size = -(-most // case.accumulation)
    mine = step[world.data_rank :: world.data_size]
    groups = [mine[index * size : (index + 1) * size] for index in range(case.accumulation)]
    layout = {"rows": rows, "packed": packed, "leaking": leaking}[case.layout]
    return [layout(group) if group else Batch.empty() for group in groups]


def train(strategy: Strategy, world: World, case: Case, index: int) -> tuple[float, float]:
    """One step on the documents of step `index`. Returns the loss over all ranks and the norm."""
    step = documents()[index]
    num_supervised = sum(document.num_supervised for document in step)
    nll = torch.zeros(NUM_SOURCES)
    batches = micro_batches(step, world, case)
    for number, batch in enumerate(batches):
        scale = 1 / num_supervised
        if case.mean_of_means:
            scale = 1 / max(1, batch.num_supervised) / len(batches) / world.data_size
        answer = strategy.forward(LossRequest(batch, scale, batch.num_tokens / 100, NUM_SOURCES))
        assert isinstance(answer, LossSums)
        loss = answer.loss * (float("nan") if case.poisoned == (index, world.rank) else case.wrong_factor)
        strategy.backward(loss, last=number == len(batches) - 1)
        nll += answer.nll
    norm = strategy.step(case.recipe.lr, keep=case.kept)
    return float(sum_over(world, nll).sum()) / num_supervised, float(norm)


def take(strategy: Strategy) -> dict[str, Tensor]:
    """All trained parameters under the reference's names; on rank 0."""
    return {reference_name(name): full for name, full in strategy.gather() if full is not None}


def run_case(world: World, case: Case) -> Outcome:
    """All steps of a case. Losses and norms on every rank, parameters on rank 0."""
    strategy = prepared(world, case)
    outcome = Outcome()
    for index in range(len(documents())):
        loss, norm = train(strategy, world, case, index)
        outcome.losses.append(loss)
        outcome.norms.append(norm)
        if index == 0:
            outcome.first = take(strategy)
    outcome.last = take(strategy)
    return outcome
