"""`distft.json`: what a finished folder was when it was saved, by which it can be told later whether it still is that.

Plain transformers and PEFT pass over this file.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from distft.errors import NegativeVerdict
from distft.model.decode import stop_ids
from distft.model.folder import TOKENIZER_FILES
from distft.model.probe import Probe, Recorded
from distft.weights.write import fsync, hash_file

PROOF_FILE = "distft.json"
FORMAT = 1
SEAL = ',\n "xxh3_128": "'
MOST_BYTES = 64 * 1024**2  # of a JSON file that is read whole
TOKENIZER_PARTS = (*TOKENIZER_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Proof:
    """What was saved. Every hash is an XXH3-128 in hexadecimal."""

    kind: str  # model or adapter
    tensors: dict[str, str]  # of each stored tensor with its shape and element type
    files: dict[str, dict[str, Any]]  # num_bytes and xxh3_128 of every other file of the folder
    tokenizer: str  # of the tokenizer's files
    chat_template: str | None  # of the template that serving takes
    stop_ids: list[int]  # tokens that end an answer
    precision: str  # fp32 or bf16: what computed the logits
    base: dict[str, Any] = field(
        default_factory=dict
    )  # its path or hub id and, of an adapter, its weight files' hashes
    prompts: list[dict[str, Any]] = field(default_factory=list)  # see `Recorded`
    format: int = FORMAT

    def text(self) -> str:
        """JSON that carries the hash of its own text as its last entry."""
        return sealed(json.dumps(dataclasses.asdict(self), indent=1).removesuffix("\n}"))

    def recorded(self) -> Recorded | None:
        return Recorded.of_json(self.prompts) if self.prompts else None

    @classmethod
    def read(cls, folder: Path) -> Proof | None:
        """The folder's own proof; None where it has none.

        Raises:
            NegativeVerdict: it is not what was written.
        """
        path = folder / PROOF_FILE
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > MOST_BYTES:
                raise NegativeVerdict(f"{path} has {path.stat().st_size:,} bytes: distft writes none of that size.")
            text = path.read_bytes().decode()
            if text != sealed(text.rpartition(SEAL)[0]):
                raise NegativeVerdict(f"{path} was changed since it was written.")
            values = json.loads(text)
            del values["xxh3_128"]
            if values["format"] != FORMAT:
                raise NegativeVerdict(f"{path} has format {values['format']}; this version reads {FORMAT}.")
            proof = cls(**values)
            proof.recorded()
            return proof
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise NegativeVerdict(f"{path} is not what distft writes ({type(error).__name__}: {error}).") from None


def sealed(body: str) -> str:
    return f'{body}{SEAL}{xxhash.xxh3_128_hexdigest(body.encode())}"\n}}\n'


def tokenizer_hash(folder: Path) -> str:
    """Over the names and bytes of the tokenizer's files."""
    digest = xxhash.xxh3_128()
    for name in sorted(TOKENIZER_PARTS):
        if (folder / name).is_file():
            digest.update(f"{name} {hash_file(folder / name)}\n".encode())
    return digest.hexdigest()


def template_hash(tokenizer: Any) -> str | None:
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return None if template is None else xxhash.xxh3_128_hexdigest(template.encode())


def weight_hashes(folder: Path) -> dict[str, str]:
    """Of every safetensors file of a model folder."""
    return {path.name: hash_file(path) for path in sorted(folder.glob("*.safetensors"))}


def prove(
    tokenizer: Any, tokenizer_files: Path, generation: Path, probe: Probe | None, precision: str
) -> dict[str, Any]:
    """What a checkpoint records beside its hashes: the entries of a `Proof` that need no final folder.

    `tokenizer_files`: the tokenizer's folder. `generation`: the folder with generation_config.json.
    """
    return {
        "tokenizer": tokenizer_hash(tokenizer_files),
        "chat_template": template_hash(tokenizer),
        "stop_ids": stop_ids(tokenizer, generation),
        "precision": precision,
        "prompts": [] if probe is None else Recorded.of(probe).as_json(),
    }


def write_proof(
    folder: Path,
    kind: str,
    hashes: dict[str, str],
    base: dict[str, Any],
    tokenizer: Any,
    probe: Probe | None,
    precision: str,
) -> None:
    """Write `distft.json` into a folder that is otherwise complete.

    `hashes`: of the tensors as they were handed to the writer. `probe`: the trainer's logits, if there are any.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != PROOF_FILE)
    proof = Proof(
        kind=kind,
        tensors=hashes,
        files={
            name: {"num_bytes": (folder / name).stat().st_size, "xxh3_128": hash_file(folder / name)} for name in names
        },
        base=base,
        **prove(tokenizer, folder, folder, probe, precision),
    )
    (folder / PROOF_FILE).write_text(proof.text(), encoding="utf-8")
    fsync(folder / PROOF_FILE)
