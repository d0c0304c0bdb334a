"""Made-up chat rows of a long-tailed length and a small Llama with random weights whose tokenizer knows their words.

    python benchmarks/rows.py FOLDER --size nano --vocabulary 32000 --supervised 0.57 --rows 4000

writes `rows.jsonl` (columns `messages` and `length`, in tokens), `model/` (a Hugging Face folder) and `told.json` (what
the rows are like, counted with that tokenizer). The same arguments give the same bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64},
    "nano": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 384},
    "micro": {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 1152},
}
MEDIAN_LENGTH, SPREAD = 130.0, 0.76  # tokens, and the deviation of their logarithm: 99 % are below 800
SHORTEST, LONGEST = 24, 1000
ZIPF = 1.05  # how fast words become rare
SYLLABLES = [start + vowel for start in (*"bdfgklmnprstvz", "ch", "st") for vowel in "aeiou"]


def lexicon(num_words: int, random: Any) -> list[str]:
    """Distinct words of two to four syllables, the frequent ones first."""
    words: dict[str, None] = {}
    while len(words) < num_words:
        lengths = random.integers(2, 5, size=num_words)
        parts = random.integers(0, len(SYLLABLES), size=(num_words, 4))
        for length, part in zip(lengths, parts, strict=True):
            words["".join(SYLLABLES[index] for index in part[:length])] = None
    return list(words)[:num_words]


def tokenizer_texts(words: list[str]) -> Iterator[str]:
    """Every word, the frequent ones more often, and the words of the chat template."""
    for repeats, share in ((1, 1.0), (3, 0.2), (10, 0.02)):
        chosen = words[: int(len(words) * share)]
        for _ in range(repeats):
            yield "user\nassistant\n " + " ".join(chosen)


def say(num_tokens: int, draws: Iterator[int], words: list[str], sizes: list[int]) -> str:
    """Words of about `num_tokens` tokens: at most the last word is too long."""
    said: list[str] = []
    while num_tokens > 0:
        word = next(draws)
        said.append(words[word])
        num_tokens -= sizes[word]
    return " ".join(said)


def word_draws(num_words: int, random: Any) -> Iterator[int]:
    import numpy as np

    shares = 1 / np.arange(1, num_words + 1) ** ZIPF
    edges = np.cumsum(shares / shares.sum())
    while True:
        yield from np.searchsorted(edges[:-1], random.random(4096)).tolist()


def make(folder: Path, size: str, vocabulary: int, supervised: float, num_rows: int, seed: int = 0) -> None:
    """Fill `folder`; see the module."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from transformers import AutoTokenizer

    from distft.config.schema import TinyShape
    from distft.model.tiny import build_tiny

    random = np.random.default_rng(seed)
    words = lexicon(vocabulary, random)
    folder.mkdir(parents=True, exist_ok=True)
    built = build_tiny(TinyShape(vocab_size=vocabulary, **SIZES[size]), lambda: tokenizer_texts(words), folder / "made")
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(built, folder / "model")
    shutil.rmtree(folder / "made")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sizes = [len(ids) for ids in tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]]
    template = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], return_dict=True
        )["input_ids"]
    )

    draws = word_draws(len(words), random)
    targets = np.clip(np.exp(random.normal(np.log(MEDIAN_LENGTH), SPREAD, num_rows)), SHORTEST, LONGEST).astype(int)
    shares = np.clip(random.normal(supervised, 0.08, num_rows), 0.1, 0.9)
    lengths, trained = [], 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for length, share in zip(targets.tolist(), shares.tolist(), strict=True):
            answer = max(1, round(share * length) - 1)  # its stop token is trained as well
            question = max(1, length - template - answer)
            messages = [
                {"role": "user", "content": say(question, draws, words, sizes)},
                {"role": "assistant", "content": say(answer, draws, words, sizes)},
            ]
            told = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            lengths.append(len(told["input_ids"]))
            trained += sum(told["assistant_masks"])
            file.write(json.dumps({"messages": messages, "length": lengths[-1]}) + "\n")
    summary = {
        "size": size,
        "vocabulary": vocabulary,
        "rows": num_rows,
        "tokens": sum(lengths),
        "supervised_share": round(trained / sum(lengths), 4),
        "mean_length": round(sum(lengths) / num_rows, 2),
        "median_length": int(np.median(lengths)),
        "length_99": int(np.quantile(lengths, 0.99)),
        "longest": max(lengths),
    }
    (folder / "told.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--supervised", type=float, default=0.57, help="mean share of supervised tokens")
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.folder, given.size, given.vocabulary, given.supervised, given.rows, given.seed)
    print((given.folder / "told.json").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
