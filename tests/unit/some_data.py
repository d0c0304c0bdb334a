"""Small tokenizers and runs for the tests of the data room."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from distft.config.schema import Run
from distft.data.cache import PreparedData
from distft.data.encode import prepare
from distft.objective import make_encoder

WORDS = [
    "What is two plus two?\n\nIt is four.\n\n\nAnd   what follows? 12 345",
    "user assistant system question answer the model says yes, no or maybe.\n\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n\n",
]


@functools.lru_cache(maxsize=1)
def _trained() -> str:
    from distft.model.tiny import train_tokenizer

    return str(train_tokenizer(WORDS * 50, 420).to_str())


def byte_level(**changes: Any) -> Any:
    """A byte-level BPE tokenizer in which `\\n\\n` is one token; ChatML with generation markers."""
    from tokenizers import Tokenizer

    from distft.model.tiny import wrap

    tokenizer = wrap(Tokenizer.from_str(_trained()))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def space_first() -> Any:
    """A tokenizer as SentencePiece makes them: a space is put before the first word, characters fall back to bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.train_from_iterator(
        WORDS * 50, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def a_run(cache: Path, **data: Any) -> Run:
    """A run with these values under `data`; one process, short bins."""
    run = Run()
    run.data.cache_dir, run.data.workers, run.data.sequence_length = str(cache), 1, 128
    for name, value in data.items():
        assert hasattr(run.data, name), name
        setattr(run.data, name, value)
    return run


def prepared(run: Run, tokenizer: Any, out: Path) -> PreparedData:
    """The tokenised data of a run, with `rejected.jsonl` and the tokenizer under `out`."""
    tokenizer.save_pretrained(out / "tokenizer")
    return prepare(run, tokenizer, out / "tokenizer", out, make_encoder)


def write_jsonl(file: Path, rows: list[Any]) -> str:
    """Rows as lines; bytes are written as they are. Returns the path."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return str(file)


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths."""
    return [
        {"question": f"What is {n} plus {n}?", "answer": "It is " + "yes, " * (n % 7) + str(2 * n)}
        for n in range(count)
    ]
