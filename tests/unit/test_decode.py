"""Decoding by whole prefixes: the same answers as transformers' own generation, and ranks that never part ways."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.model import decode
from tests.unit import folders

CPU = torch.device("cpu")


def forward_of(model: Any) -> decode.Forward:
    @torch.no_grad()
    def forward(input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        out = model(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask.long())
        return out.logits.flatten(0, 1)[positions]

    return forward


PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17]]


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 8])
def test_greedy_as_transformers(rows_at_a_time: int) -> None:
    model = folders.make_model("llama")
    model.generation_config.eos_token_id = None
    answers = decode.generate(forward_of(model), PROMPTS, [], 12, CPU, rows_at_a_time=rows_at_a_time)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
        assert answer == wanted[len(prompt) :].tolist()


def test_a_stop_token_ends_its_row_alone() -> None:
    """Counts up from the last token: each row ends when it meets the stop."""
    calls: list[int] = []

    def forward(input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        calls.append(len(input_ids))
        assert attention_mask.sum(dim=1).tolist() == (positions % input_ids.shape[1] + 1).tolist()
        last = input_ids.flatten()[positions]
        return torch.nn.functional.one_hot(last + 1, 40).float()

    answers = decode.generate(forward, [[3], [1, 7], [20], []], [9, 30], 6, CPU)
    assert answers == [[4, 5, 6, 7, 8], [8], [21, 22, 23, 24, 25, 26], []]
    assert calls == [3, 3, 2, 2, 2, 2]


def test_sampling_is_repeatable_and_its_rows_independent() -> None:
    forward = forward_of(folders.make_model("llama"))

    def sampled(prompts: list[list[int]], **kwargs: Any) -> list[list[int]]:
        return decode.generate(forward, prompts, [], 10, CPU, temperature=1.0, **kwargs)

    first = sampled(PROMPTS, seed=1)
    assert sampled(PROMPTS, seed=1) == first
    assert sampled(PROMPTS, seed=2) != first
    assert sampled(PROMPTS, seed=1, rows_at_a_time=1) == first
    assert sampled(PROMPTS[:1], seed=1) == first[:1]
    assert sampled(PROMPTS, seed=1, top_p=1e-6) == decode.generate(forward, PROMPTS, [], 10, CPU)


def test_draws_follow_temperature_and_top_p() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def shares(**kwargs: float) -> list[float]:
        drawn = (decode.draw(logits, kwargs.get("t", 1.0), kwargs.get("p", 1.0), generator) for _ in range(4000))
        counts = Counter(drawn)
        return [counts[token] / 4000 for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(t=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)
    assert shares(p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)


def decode_apart(*_: Any) -> tuple[list[list[int]], int]:
    """Run by every rank: each has an opinion of its own about the next token, and about when to stop."""
    import torch.distributed as dist

    rank, calls = dist.get_rank(), 0

    def forward(input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.nn.functional.one_hot((input_ids.flatten()[positions] + 1 + rank) % 40, 40).float()

    return decode.generate(forward, [[3], [1]], [9], 20, CPU), calls


def test_ranks_that_round_differently_stay_together(pool: Any) -> None:
    results = pool(2).run(decode_apart)
    assert results[0] == results[1]
    assert results[0] == ([[4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7, 8]], 8)


def test_stops_come_from_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = folders.tokenizer()
    assert decode.stop_ids(tokenizer, tmp_path) == [tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert decode.stop_ids(tokenizer, tmp_path) == [1, 5, 7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 8}))
    tokenizer.eos_token = None
    assert decode.stop_ids(tokenizer, tmp_path) == [8]


# --- samples of evaluation rows -------------------------------------------------------------------------------------


class Rows:
    """An evaluation source of rows with `prompt` untrained and `answer` trained tokens."""

    def __init__(self, name: str, rows: list[tuple[int, int, int]]) -> None:
        self.name, self.shapes = name, rows
        self.lengths = np.array([sum(row) for row in rows], dtype=np.int32)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        prompt, answer, after = self.shapes[index]
        ids = np.arange(100 * index, 100 * index + prompt + answer + after, dtype=np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        trained[prompt : prompt + answer] = True
        return ids, trained

    def row_id(self, index: int) -> str:
        return f"{self.name}-{index}"


def test_questions_are_cut_where_the_model_speaks() -> None:
    from distft.evaluation.samples import choose_questions

    chat: Any = Rows("chat", [(4, 3, 2), (5, 2, 0), (6, 1, 1), (7, 4, 0)])
    text: Any = Rows("text", [(0, 10, 0)] * 2)
    questions = choose_questions([chat, text], 4, longest=20)
    assert [question.row_id for question in questions] == ["chat-0", "text-0", "chat-2", "text-1"]
    assert questions[0].prompt == [0, 1, 2, 3]
    assert questions[0].reference == [4, 5, 6]
    assert len(questions[1].prompt) == len(questions[1].reference) == 5  # plain text: its first half
    assert [question.row_id for question in choose_questions([chat], 3, longest=5)] == ["chat-0", "chat-1", "chat-2"]
    long: Any = Rows("long", [(50, 3, 0), (9, 2, 0)])
    assert [question.row_id for question in choose_questions([long], 1, longest=20)] == ["long-1"]
    assert [question.row_id for question in choose_questions([long], 1, longest=2)] == ["long-1"]
    assert choose_questions([Rows("none", [])], 3, longest=9) == []  # type: ignore[list-item]


class PlainStrategy:
    """An engine's forward for one process: what the samples and the probe need of it."""

    def __init__(self, model: Any) -> None:
        self.trainee, self.modes = model, list[bool]()

    def forward(self, request: Any) -> Tensor:
        self.modes.append(self.trainee.training)
        assert not torch.is_grad_enabled()
        return forward_of(self.trainee)(
            request.input_ids, request.position_ids, request.attention_mask, request.positions
        )


def test_samples_and_probe_of_an_engine() -> None:
    from distft.evaluation.samples import sample_answers, take_probe
    from distft.model.probe import prompt_ids
    from distft.world import World

    model = folders.make_model("llama")
    model.train()
    strategy: Any = PlainStrategy(model)
    world = World(0, 1, 0, 0, 1, CPU)
    source: Any = Rows("chat", [(4, 3, 0), (6, 2, 0)])
    source.row = lambda index: (np.arange(3, 10, dtype=np.int32), np.arange(7) >= 4)
    rows = sample_answers(strategy, [source], folders.tokenizer(), [1], 2, 5, 64, world)
    assert [set(row) for row in rows] == [{"source", "id", "prompt", "reference", "answer"}] * 2
    expected = model.eval().generate(torch.arange(3, 7)[None], max_new_tokens=5, do_sample=False)[0, 4:]
    assert rows[0]["answer"] == folders.tokenizer().decode(expected, skip_special_tokens=True).strip()
    model.train()
    probe = take_probe(strategy, [source.row(0)[0][:48].tolist(), [3, 4]], world)
    assert model.training
    assert not any(strategy.modes)
    wanted = folders.logits(model, probe.input_ids).flatten(0, 1)[probe.positions]
    torch.testing.assert_close(probe.logits, wanted)
    assert probe.positions.tolist() == [0, 2, 4, 6, 7, 8]  # rows of seven tokens and of two
    prompts = prompt_ids(folders.tokenizer())
    assert len(prompts) == 3
    assert all(0 < len(row) <= 48 for row in prompts)
