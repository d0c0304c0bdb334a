"""What the model says: sampled answers to evaluation rows, and the logits that the final folder is checked by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distft.model.decode import generate, padded
from distft.model.probe import Probe, positions_of
from distft.objective.trainee import LogitsRequest
from distft.world import World

if TYPE_CHECKING:
    from distft.data.cache import EncodedSource
    from distft.strategy.base import Strategy

TRIES = 20  # rows looked at for each sample before a shorter answer is accepted


@dataclass(frozen=True)
class Question:
    """One evaluation row, cut where the model begins to speak."""

    source: str
    row_id: str
    prompt: list[int]
    reference: list[int]


def sample_answers(
    strategy: Strategy,
    sources: Sequence[EncodedSource],
    tokenizer: Any,
    stops: Sequence[int],
    num_samples: int,
    max_new_tokens: int,
    max_length: int,
    world: World,
) -> list[dict[str, str]]:
    """Greedy answers to `num_samples` evaluation rows, spread evenly over the sources, always the same ones.

    A prompt is everything before the row's first trained token; where the first half of a row is trained (plain text),
    it is the row's first half. Prompt and answer fit in `max_length` positions. Collective: every rank answers.
    Returns rows with source, id, prompt, reference and answer as text.
    """
    questions = choose_questions(sources, num_samples, max_length - max_new_tokens)
    room = max_length - max((len(question.prompt) for question in questions), default=0)
    with evaluating(strategy):
        answers = generate(
            forward_of(strategy),
            [question.prompt for question in questions],
            stops,
            max(1, min(max_new_tokens, room)),
            world.device,
        )
    return [
        {
            "source": question.source,
            "id": question.row_id,
            "prompt": tokenizer.decode(question.prompt),
            "reference": tokenizer.decode(question.reference, skip_special_tokens=True).strip(),
            "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]


def choose_questions(sources: Sequence[EncodedSource], num_samples: int, longest: int) -> list[Question]:
    """Evenly spaced rows of the sources in turn; of rows next to each other the first whose prompt is short enough."""
    questions: list[Question] = []
    filled = [source for source in sources if len(source.lengths)]
    for sample in range(num_samples if filled else 0):
        source = filled[sample % len(filled)]
        share, shares = sample // len(filled), -(-num_samples // len(filled))
        first = share * len(source.lengths) // shares
        candidates = [question_of(source, row) for row in range(first, min(first + TRIES, len(source.lengths)))]
        found = [question for question in candidates if question.prompt]
        short = [question for question in found if len(question.prompt) <= longest]
        if found:
            questions.append(short[0] if short else min(found, key=lambda question: len(question.prompt)))
    return questions


def question_of(source: EncodedSource, row: int) -> Question:
    ids, trained = source.row(row)
    start = int(trained.argmax()) if trained.any() else len(ids)
    if start <= 1:
        start = len(ids) // 2
    spoken = trained[start:]
    end = start + (int((~spoken).argmax()) if (~spoken).any() else len(spoken))
    return Question(source.name, source.row_id(row), ids[:start].tolist(), ids[start:end].tolist())


def take_probe(strategy: Strategy, prompts: Sequence[Sequence[int]], world: World) -> Probe:
    """The trainer's logits at a few positions of `prompts` (token ids, see `distft.model.probe`). Collective."""
    input_ids, position_ids, mask, _ = padded(prompts, world.device)
    length = input_ids.shape[1]
    picked = [row * length + column for row, columns in enumerate(positions_of(prompts)) for column in columns]
    positions = torch.tensor(picked, device=world.device)
    with evaluating(strategy):
        logits = forward_of(strategy)(input_ids, position_ids, mask, positions)
    return Probe(input_ids.cpu(), mask.cpu(), positions.cpu(), logits.float().cpu())


def forward_of(strategy: Strategy) -> Any:
    """The engine as a plain function of tensors, as `distft.model.decode.generate` takes it."""

    def forward(input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        logits = strategy.forward(LogitsRequest(input_ids, position_ids, attention_mask, positions))
        assert isinstance(logits, Tensor)
        return logits

    return forward


@contextlib.contextmanager
def evaluating(strategy: Strategy) -> Iterator[None]:
    """No dropout and no gradients inside."""
    strategy.trainee.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        strategy.trainee.train()
