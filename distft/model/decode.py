"""Answers from a model that may be sharded: whole prefixes are computed anew, so that any engine can decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distft import heartbeat
from distft.world import seed_of

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(input_ids [rows, length], position_ids [rows, length], attention_mask [rows, length] bool, positions [n]) ->
logits [n, vocab]; positions are flat, row * length + column."""


def stop_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Tokens at which an answer ends: the tokenizer's stop token and those of the folder's generation_config.json."""
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    found = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if tokenizer.eos_token_id is not None:
        found = [*found, tokenizer.eos_token_id]
    return sorted(set(found))


@torch.no_grad()
def generate(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    max_new_tokens: int,
    device: torch.device,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    rows_at_a_time: int = 8,
) -> list[list[int]]:
    """Answers to prompts, without the stop token that ended them.

    Every rank gives the same prompts and makes the same number of forward passes: each token is rank 0's choice, and
    all decide on it when to stop. `temperature` 0 takes the likeliest token; else it is drawn from the smallest set of
    tokens that holds `top_p` of the probability (Holtzman et al. 2020, arXiv:1904.09751), by a generator of its own
    for each prompt, so that an answer does not depend on what else is decoded.
    """
    answers: list[list[int]] = []
    for first in range(0, len(prompts), rows_at_a_time):
        chunk = prompts[first : first + rows_at_a_time]
        generators = [torch.Generator().manual_seed(seed_of(seed, first + row)) for row in range(len(chunk))]

        def choose(logits: Tensor, rows: Sequence[int], generators: list[torch.Generator] = generators) -> Tensor:
            if temperature == 0:
                return logits.argmax(dim=-1)
            drawn = [draw(logits[i], temperature, top_p, generators[row]) for i, row in enumerate(rows)]
            return torch.tensor(drawn, device=logits.device)

        answers += decode_rows(forward, chunk, frozenset(stops), max_new_tokens, device, choose)
    return answers


def decode_rows(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    max_new_tokens: int,
    device: torch.device,
    choose: Callable[[Tensor, Sequence[int]], Tensor],
) -> list[list[int]]:
    texts = [list(prompt) for prompt in prompts]
    open_rows = [row for row, prompt in enumerate(prompts) if prompt]
    for _ in range(max_new_tokens):
        if not open_rows:
            break
        heartbeat.beat()
        logits = forward(*padded([texts[row] for row in open_rows], device))
        tokens = rank_0_of(choose(logits.float(), open_rows))
        for row, token in zip(open_rows, tokens.tolist(), strict=True):
            texts[row].append(token)
        open_rows = [row for row in open_rows if texts[row][-1] not in stops]
    return [list(cut_stop(text[len(prompt) :], stops)) for text, prompt in zip(texts, prompts, strict=True)]


def cut_stop(tokens: Sequence[int], stops: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        if token in stops:
            return
        yield token


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows padded on the right, as `Forward` takes them; the positions are each row's last real token."""
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    input_ids = torch.tensor([[*text, *[text[-1]] * (longest - len(text))] for text in texts])
    columns = torch.arange(longest).expand(len(texts), longest)
    mask = columns < lengths[:, None]
    positions = torch.arange(len(texts)) * longest + lengths - 1
    return input_ids.to(device), columns.contiguous().to(device), mask.to(device), positions.to(device)


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [vocab]."""
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the likeliest token is never outside
        probabilities[order[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def rank_0_of(tokens: Tensor) -> Tensor:
    """What rank 0 has: ranks may round differently, but must never part ways."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tokens, src=0)
    return tokens
