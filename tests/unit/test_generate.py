"""`distft generate`: questions in, answers out, from every kind of finished folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.config.schema.generate import Generate
from distft.errors import Mistakes, UserMistake
from distft.verbs.generate import main
from tests.unit import folders
from tests.unit.test_final import LORA, Trained


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder whose final/ is a LoRA adapter."""
    trained = Trained("llama", tmp_path, LORA)
    trained.save()
    return tmp_path


def wanted(folder: Path, text: str, num_tokens: int) -> str:
    from distft.model.plain import load_plain

    tokenizer = folders.tokenizer()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    model = load_plain(folder, "fp32", torch.device("cpu"))
    stops = {"eos_token_id": 1, "pad_token_id": 2}
    tokens = model.generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False, **stops)[0]
    return str(tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True)).strip()


def test_one_prompt_is_printed(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Generate(prompt="hi", max_new_tokens=6), str(run_folder)) == 0
    answer = wanted(run_folder / "final", "hi?!", 6)  # the template asks with a ?, and the answer begins after !
    assert capsys.readouterr().out.strip() == answer
    main(Generate(prompt="hi", max_new_tokens=6), str(run_folder / "base"))
    assert capsys.readouterr().out.strip() == wanted(run_folder / "base", "hi?!", 6) != answer


def test_a_file_of_questions(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "known"}]
    records: list[dict[str, Any]] = [{"question": "hi", "id": 7}, {"messages": chat}, {"prompt": "a longer question"}]
    lines = [*(json.dumps(record) for record in records), "", '"hi"']
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    out = tmp_path / "answers" / "a.jsonl"
    generate = Generate(prompts=str(tmp_path / "q.jsonl"), output=str(out), max_new_tokens=5, batch_size=2)
    assert main(generate, str(run_folder)) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: value for key, value in answer.items() if key != "answer"} for answer in answers] == [
        *records,
        {"prompt": "hi"},
    ]
    texts = ["hi?!", "abc?!", "a longer question?!", "hi?!"]  # what the model says itself is not given to it
    assert [answer["answer"] for answer in answers] == [wanted(run_folder / "final", text, 5) for text in texts]
    assert "4 answers" in capsys.readouterr().out

    (tmp_path / "q.txt").write_text("hi\n\nabc\n")
    main(Generate(prompts=str(tmp_path / "q.txt"), max_new_tokens=5), str(run_folder))
    shown = capsys.readouterr().out
    assert f"> hi\n{answers[0]['answer']}\n" in shown
    assert f"> abc\n{answers[1]['answer']}\n" in shown


def test_system_and_sampling(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Generate(prompt="hi", system="be kind", max_new_tokens=6), str(run_folder))
    assert capsys.readouterr().out.strip() == wanted(run_folder / "final", "be kind?hi?!", 6)

    def sampled(**kwargs: Any) -> str:
        main(Generate(prompt="hi", max_new_tokens=12, temperature=1.5, **kwargs), str(run_folder))
        return capsys.readouterr().out

    assert sampled(seed=1) == sampled(seed=1)
    assert sampled(seed=1) != sampled(seed=2)
    assert sampled(top_p=1e-6).strip() == wanted(run_folder / "final", "hi?!", 12)


def test_a_base_model_continues_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders.save(folders.make_model("llama"), tmp_path)
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    main(Generate(prompt="hi", max_new_tokens=6), str(folder))
    assert capsys.readouterr().out.strip() == wanted(folder, "hi", 6)
    with pytest.raises(UserMistake, match="system is for models with a chat template"):
        main(Generate(prompt="hi", system="x"), str(folder))


def test_mistakes_are_told_at_once(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Mistakes) as caught:
        main(Generate(max_new_tokens=0, top_p=0.5, batch_size=0, temperature=0.0), "nowhere")
    assert len(caught.value.problems) == 4
    with pytest.raises(UserMistake, match=r"is no folder. Did you mean .*/base\?"):
        main(Generate(prompt="x"), str(run_folder / "bsae"))
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserMistake, match="has not ended"):
        main(Generate(prompt="x"), str(tmp_path / "unfinished"))
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n{broken\n')
    with pytest.raises(UserMistake, match=r"q\.jsonl, line 2 is no JSON"):
        main(Generate(prompts=str(tmp_path / "q.jsonl")), str(run_folder))
    (tmp_path / "q.jsonl").write_text('{"answer": "x"}\n')
    with pytest.raises(UserMistake, match="line 1 holds no question"):
        main(Generate(prompts=str(tmp_path / "q.jsonl")), str(run_folder))
    with pytest.raises(UserMistake, match="cannot be read"):
        main(Generate(prompts=str(tmp_path / "none.txt")), str(run_folder))
