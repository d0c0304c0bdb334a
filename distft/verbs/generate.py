"""`distft generate <folder>`: answers from a finished folder, through plain transformers or PEFT with its cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from distft.config.schema.generate import Generate
from distft.errors import DONE, Mistakes, UserMistake

QUESTION_FIELDS = ("prompt", "question", "instruction", "text")


def main(generate: Generate, folder: str) -> int:
    """Print the answer to `prompt` as it is made, or answer every line of `prompts`. Returns the exit code 0.

    `folder`: a model's folder, a PEFT folder, or the folder of a run, whose final/ is taken.

    Raises:
        UserMistake: no such folder, no question, or one that cannot be read.
    """
    check(generate)
    path = model_folder(folder)
    questions = list(read_questions(generate))
    answerer = Answerer(generate, path)
    if generate.output is None:
        answer_all(answerer, generate, questions, None)
    else:
        target = Path(generate.output).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", encoding="utf-8") as file:
            answer_all(answerer, generate, questions, file)
        print(f"{len(questions)} answers in {target}")
    return DONE


def check(generate: Generate) -> None:
    problems = []
    if (generate.prompt is None) == (generate.prompts is None):
        problems.append("distft generate needs either prompt=<a question> or prompts=<a file of questions>.")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(generate, name) < 1:
            problems.append(f"{name}={getattr(generate, name)} must be at least 1.")
    if generate.temperature < 0:
        problems.append(f"temperature={generate.temperature} must be 0 (the likeliest token) or more.")
    if not 0 < generate.top_p <= 1:
        problems.append(f"top_p={generate.top_p} must lie between 0 and 1.")
    elif generate.top_p < 1 and generate.temperature == 0:
        problems.append(f"top_p={generate.top_p} changes nothing at temperature=0; set temperature=0.7, for example.")
    if generate.precision not in ("auto", "fp32", "bf16"):
        problems.append(f"precision={generate.precision} must be auto, fp32 or bf16.")
    if problems:
        raise Mistakes(problems)


def model_folder(folder: str) -> Path:
    """The folder itself, or the final/ of a run's folder."""
    path = Path(folder).expanduser()
    for candidate in (path, path / "final"):
        if (candidate / "config.json").exists() or (candidate / "adapter_config.json").exists():
            return candidate
    if (path / "checkpoints").is_dir():
        raise UserMistake(f"{path} is a run without a final/ folder: it has not ended. Train to its end first.")
    from distft.model.folder import nearest_folder

    kind = "holds no model (config.json or adapter_config.json)" if path.is_dir() else "is no folder"
    raise UserMistake(f"{path} {kind}.{nearest_folder(path)}")


def read_questions(generate: Generate) -> Iterator[dict[str, Any]]:
    """Each question as a record with `messages`, or `prompt` where it is plain text, and its own other fields."""
    if generate.prompt is not None:
        yield {"prompt": generate.prompt}
        return
    assert generate.prompts is not None
    path = Path(generate.prompts).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserMistake(f"prompts={path} cannot be read: {error}.") from None
    is_json = path.suffix in (".jsonl", ".json", ".ndjson")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield record_of(line, f"{path}, line {number}") if is_json else {"prompt": line}


def record_of(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserMistake(f"{place} is no JSON: {error}.") from None
    if isinstance(record, str):
        return {"prompt": record}
    fields = ("messages", *QUESTION_FIELDS)
    if not isinstance(record, dict) or not any(record.get(field) for field in fields):
        raise UserMistake(f"{place} holds no question; it needs one of the fields {', '.join(fields)}.")
    return record


class Answerer:
    """A model, its tokenizer and how it answers."""

    def __init__(self, generate: Generate, folder: Path) -> None:
        import torch

        from distft.model.decode import stop_ids
        from distft.model.folder import read_tokenizer
        from distft.model.plain import load_plain, tokenizer_folder

        self.generate, self.folder = generate, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = generate.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.tokenizer = read_tokenizer(tokenizer_folder(folder), generate.trust_remote_code)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if generate.system is not None and not self.tokenizer.chat_template:
            raise UserMistake(f"system is for models with a chat template; the tokenizer of {folder} has none.")
        self.model = load_plain(folder, precision, self.device, generate.trust_remote_code)
        self.stops = stop_ids(self.tokenizer, folder)

    def text_of(self, question: dict[str, Any]) -> str:
        """The text that the model continues: the chat template's, or the question itself for a base model."""
        messages = question.get("messages")
        if messages is None:
            prompt = next(str(question[field]) for field in QUESTION_FIELDS if question.get(field))
            if not self.tokenizer.chat_template:
                return prompt
            messages = [{"role": "user", "content": prompt}]
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]  # a training row: the model is asked for what it says itself
        if self.generate.system is not None:
            system = {"role": "system", "content": self.generate.system}
            messages = [system, *(message for message in messages if message.get("role") != "system")]
        if not self.tokenizer.chat_template:
            raise UserMistake(f"messages need a chat template; the tokenizer of {self.folder} has none.")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def answer(self, questions: Sequence[dict[str, Any]], streamer: Any = None) -> list[str]:
        """Answers to a few questions, padded on the left so that they are made together."""
        import torch

        texts = [self.text_of(question) for question in questions]
        is_chat = bool(self.tokenizer.chat_template)  # whose text holds its special tokens already
        batch = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=len(texts) > 1,
            add_special_tokens=not is_chat,
            return_token_type_ids=False,
        ).to(self.device)
        sampling = {"temperature": self.generate.temperature, "top_p": self.generate.top_p, "top_k": 0}
        torch.manual_seed(self.generate.seed)
        with torch.no_grad():
            tokens = self.model.generate(
                **batch,
                max_new_tokens=self.generate.max_new_tokens,
                do_sample=self.generate.temperature > 0,
                **(sampling if self.generate.temperature > 0 else dict.fromkeys(sampling)),
                eos_token_id=self.stops or None,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
            )
        length = batch["input_ids"].shape[1]
        return [self.tokenizer.decode(row[length:], skip_special_tokens=True).strip() for row in tokens]


def answer_all(answerer: Answerer, generate: Generate, questions: list[dict[str, Any]], file: TextIO | None) -> None:
    """Answer in order; printed as they are made, or written a line each."""
    if generate.prompt is not None and file is None:
        from transformers import TextStreamer

        answerer.answer(questions, TextStreamer(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True))
        return
    for first in range(0, len(questions), generate.batch_size):
        chunk = questions[first : first + generate.batch_size]
        for question, answer in zip(chunk, answerer.answer(chunk), strict=True):
            if file is not None:
                file.write(json.dumps({**question, "answer": answer}, ensure_ascii=False) + "\n")
                file.flush()
            else:
                print(f"> {asked(question)}\n{answer}\n")
        sys.stdout.flush()


def asked(question: dict[str, Any]) -> str:
    """The question as one line on the screen."""
    messages = [message for message in question.get("messages") or [] if message.get("role") == "user"]
    given = [question[field] for field in QUESTION_FIELDS if question.get(field)]
    return " ".join(str(messages[-1]["content"] if messages else given[0]).split())
