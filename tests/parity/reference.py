"""What every engine is compared to: a plain loop in float64, in one process, one document a forward pass.

It shares no code with distft: cross entropy over full logits, gradients by autograd, its own clipping, AdamW and SGD,
adapters as W + scale * B A put in place of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

VOCABULARY = 97  # does not divide by 2 or 4, nor do the other sizes: every shard is uneven
DOCUMENTS_A_STEP = (7, 1, 5)  # one document leaves all other ranks with nothing but empty micro-batches
LORA_RANK, LORA_ALPHA = 3, 5.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """What is computed, whatever computes it."""

    tuning: str = "full"  # or "lora"
    optimizer: str = "sgd"  # or "adamw"
    tied: bool = False
    clip: float = 0.0
    lr: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6


@dataclass(frozen=True)
class Document:
    """Tokens, and which of them are targets; the first never is."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    source: int

    @property
    def num_supervised(self) -> int:
        return sum(self.trained)


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)  # of each step
    norms: list[float] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)  # trained parameters after the first step
    last: dict[str, Tensor] = field(default_factory=dict)  # and after the last


@cache
def documents() -> tuple[tuple[Document, ...], ...]:
    """The documents of each step: lengths of 2 to 23, supervised counts of 1 to all but the first token."""
    generator = torch.Generator().manual_seed(11)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def document() -> Document:
        length = draw(2, 24)
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        share = 0.1 + 0.9 * float(torch.rand((), generator=generator))
        trained = (torch.rand(length, generator=generator) < share).tolist()
        trained[0], trained[-1] = False, True
        return Document(tuple(tokens), tuple(trained), draw(0, 2))

    return tuple(tuple(document() for _ in range(number)) for number in DOCUMENTS_A_STEP)


@cache
def config(tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        use_cache=False,
    )


@cache
def base_weights(tied: bool) -> dict[str, Tensor]:
    """fp32 weights by their Hugging Face names, large enough that every part of the model matters."""
    from transformers import LlamaForCausalLM

    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(tied))
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if parameter.ndim == 1 else noise / math.sqrt(parameter.shape[1])
    return weights


@cache
def adapter_weights(tied: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [lora_rank, in], B [out, lora_rank]) by the name of the weight they adapt; B is not zero, so that A learns."""
    generator = torch.Generator().manual_seed(6)
    adapters = {}
    for name, weight in base_weights(tied).items():
        if name.split(".")[-2] in TARGETS:
            a = torch.randn(LORA_RANK, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
            b = torch.randn(weight.shape[0], LORA_RANK, generator=generator) / 10
            adapters[name] = (a, b)
    return adapters


@cache
def reference(recipe: Recipe) -> Outcome:
    """Losses, norms and parameters of the plain loop. LoRA's parameters are called `<weight>.A` and `<weight>.B`."""
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM(config(recipe.tied)).double().eval()
    frozen = {name: weight.double() for name, weight in base_weights(recipe.tied).items()}
    if recipe.tuning == "full":
        trained = frozen
    else:
        trained = {}
        for name, (a, b) in adapter_weights(recipe.tied).items():
            trained |= {f"{name}.A": a.double(), f"{name}.B": b.double()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in trained.items()}
    outcome = Outcome()
    for index, step in enumerate(documents()):
        leaves = {name: value.clone().requires_grad_() for name, value in trained.items()}
        loss = mean_loss(model, effective(frozen, leaves, recipe), step)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        if recipe.clip:
            gradients = {name: gradient * min(1.0, recipe.clip / float(norm)) for name, gradient in gradients.items()}
        trained = {
            name: updated(value, gradients[name], moments[name], index + 1, recipe) for name, value in trained.items()
        }
        outcome.losses.append(loss.item())
        outcome.norms.append(float(norm))
        if index == 0:
            outcome.first = trained
    outcome.last = trained
    return outcome


def effective(frozen: dict[str, Tensor], leaves: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The model's weights as functions of what is trained."""
    if recipe.tuning == "full":
        weights = dict(leaves)
    else:
        weights = dict(frozen)
        for name in adapter_weights(recipe.tied):
            weights[name] = frozen[name] + LORA_ALPHA / LORA_RANK * leaves[f"{name}.B"] @ leaves[f"{name}.A"]
    if recipe.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def mean_loss(model: torch.nn.Module, weights: dict[str, Tensor], step: tuple[Document, ...]) -> Tensor:
    """Sum of the supervised tokens' NLL over their number, all documents together."""
    total = torch.zeros((), dtype=torch.float64)
    for document in step:
        ids = torch.tensor([document.tokens])
        logits = functional_call(model, weights, (), {"input_ids": ids}, tie_weights=False).logits[0]
        log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
        for position in range(1, len(document.tokens)):
            if document.trained[position]:
                total = total - log_probabilities[position - 1, document.tokens[position]]
    return total / sum(document.num_supervised for document in step)


def updated(value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], count: int, recipe: Recipe) -> Tensor:
    """One parameter after a step of plain SGD or AdamW; `moments` are updated in place. Vectors do not decay."""
    decay = recipe.weight_decay if value.ndim > 1 else 0.0
    if recipe.optimizer == "sgd":
        return value - recipe.lr * (gradient + decay * value)
    first, second = moments
    first.copy_(recipe.betas[0] * first + (1 - recipe.betas[0]) * gradient)
    second.copy_(recipe.betas[1] * second + (1 - recipe.betas[1]) * gradient**2)
    step = (first / (1 - recipe.betas[0] ** count)) / ((second / (1 - recipe.betas[1] ** count)).sqrt() + recipe.eps)
    return value * (1 - recipe.lr * decay) - recipe.lr * step
