"""Whether a finished folder is what was saved: a model's or an adapter's, made here or elsewhere.

Weights pass through memory a piece at a time. Only the logits need the model itself, so they alone may be left out for
want of memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from distft.errors import NegativeVerdict, Stop
from distft.model.decode import stop_ids
from distft.model.fits import keys
from distft.model.folder import TOKENIZER_FILES, read_tokenizer
from distft.model.foreign import PICKLES, check_adapter, check_model
from distft.model.logits import logits
from distft.model.plain import tokenizer_folder
from distft.model.proof import Proof, template_hash, tokenizer_hash, weight_hashes
from distft.model.subject import NOT_OURS, Subject
from distft.weights.findings import Finding
from distft.weights.links import refuse_links
from distft.weights.store import Weights, num_elements
from distft.weights.write import hash_file

PIECE = 16 * 1024**2  # values read at a time
CODE_AND_WEIGHTS = (".py", ".safetensors", *(pattern[1:] for pattern in PICKLES))


def verify_folder(
    folder: Path,
    max_bytes: float = math.inf,
    trust_remote_code: bool = False,
    proof: Proof | None = None,
    device: torch.device | None = None,
) -> list[Finding]:
    """Every check of a model's or an adapter's folder, in order; none raises.

    Args:
        max_bytes: of memory that the model may take for its logits; where it needs more they are left out.
        proof: what was saved; None takes the folder's own.
    """
    findings: list[Finding] = []
    try:
        proof = proof or Proof.read(folder)
    except NegativeVerdict as error:
        findings.append(Finding("proof", False, str(error)))
    subject = Subject(folder, proof, max_bytes, trust_remote_code, device or torch.device("cpu"))
    for what, check in CHECKS.items():
        try:
            found = list(check(subject))
        except Exception as error:  # whatever a folder of somebody's making leads a library to
            said = str(error) if isinstance(error, Stop) else f"{folder}: {type(error).__name__}: {error}"
            found = [Finding(what, False, said)]
            if what == "files":  # nothing more is made of a folder that is refused
                return [*findings, *found]
        subject.damaged |= what in ("files", "weights") and any(one.passed is False for one in found)
        findings += found
    return findings


def files(subject: Subject) -> Iterator[Finding]:
    """Every file has the size and the hash it was saved with, and none has joined that could be read as the model."""
    folder, proof = subject.folder, subject.proof
    if subject.is_adapter:
        check_adapter(folder)
    else:
        check_model(folder, subject.trust_remote_code)
    if proof is None:
        yield Finding("files", None, NOT_OURS)
        return
    wrong = []
    for name, record in proof.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            wrong.append(f"{path} is missing")
        elif path.stat().st_size != record["num_bytes"]:
            wrong.append(f"{path} has {path.stat().st_size:,} bytes instead of {record['num_bytes']:,}")
        elif hash_file(path) != record["xxh3_128"]:
            wrong.append(f"{path} is not what was written: it was changed, or the disk damaged it")
    present = [path for path in folder.iterdir() if path.suffix in CODE_AND_WEIGHTS]
    wrong += [f"{path} was not saved with the folder" for path in sorted(present) if path.name not in proof.files]
    total = sum(record["num_bytes"] for record in proof.files.values())
    said = "; ".join(wrong) if wrong else f"{len(proof.files)} files, {total:,} bytes, as they were saved"
    yield Finding("files", not wrong, said)


def weights(subject: Subject) -> Iterator[Finding]:
    """Every tensor against its hash; numbers that are none; an adapter that does nothing."""
    stored, proof = subject.weights(), subject.proof
    names, wrong, zero = stored.names(), [], set()
    if proof is not None and (differing := sorted(set(names) ^ set(proof.tensors))):
        one = differing[0]
        state = "missing" if one in proof.tensors else "there but was never written"
        yield Finding("weights", False, f"{subject.folder}: {one} is {state}.")
        return
    for name in names:
        digest, is_zero, is_finite = look_through(stored, name)
        if proof is not None and digest != proof.tensors[name]:
            wrong.append(f"{subject.folder}: {name} is not what was written: the disk or the file is damaged.")
        elif not is_finite:
            wrong.append(f"{subject.folder}: {name} holds values that are no numbers (nan or infinity).")
        if is_zero:
            zero.add(name)
    compared = "as they were handed to the writer" if proof else "all of them finite; with no hashes to compare with"
    yield Finding("weights", not wrong, "; ".join(wrong[:3]) if wrong else f"{len(names)} tensors, {compared}")
    if subject.is_adapter:
        yield effect(subject.folder, names, zero)


def look_through(stored: Weights, name: str) -> tuple[str, bool, bool]:
    """(XXH3-128 as `hash_of` makes it, all values are zero, all are finite) of a tensor, read a piece at a time."""
    shape, dtype = stored.shape(name), stored.dtype(name)
    digest = xxhash.xxh3_128(f"{dtype} {tuple(shape)}".encode())
    is_zero, is_finite, size = True, True, num_elements(shape)
    for start in range(0, size, PIECE):
        piece = stored.read(name, start, min(PIECE, size - start)).contiguous()
        digest.update(piece.view(torch.uint8).numpy().data)
        values = piece.float() if piece.is_floating_point() and piece.element_size() == 1 else piece
        is_zero = is_zero and not bool(values.any())
        is_finite = is_finite and bool(values.isfinite().all())
    return digest.hexdigest(), is_zero, is_finite


def effect(where: Path, names: list[str], zero: set[str]) -> Finding:
    """Whether an adapter changes anything: a pair of matrices does where neither is zero (or where DoRA's magnitude,
    which works without them, was trained too)."""
    pairs: dict[str, list[str]] = {}
    for name in names:
        layer, found, _ = name.partition(".lora_")
        if found and ("lora_A" in name or "lora_B" in name or "lora_embedding_" in name):
            pairs.setdefault(layer, []).append(name)
    working = [layer for layer, matrices in pairs.items() if not zero.intersection(matrices)]
    if not working and any("lora_magnitude_vector" in name for name in names):
        return Finding(
            "adapter", None, "its matrices are zero; whether its magnitudes do anything only logits can tell"
        )
    if not working:
        return Finding(
            "adapter", False, f"{where}: it does nothing: in each of its {len(pairs)} pairs a matrix is all zero."
        )
    return Finding("adapter", True, f"{len(working)} of its {len(pairs)} pairs of matrices do something")


def tokenizer(subject: Subject) -> Iterator[Finding]:
    folder, proof = subject.folder, subject.proof
    if not any((folder / name).exists() for name in TOKENIZER_FILES) and not subject.is_adapter:
        yield Finding("tokenizer", False, f"{folder} holds no tokenizer.")
        return
    words = tokenizer_folder(folder)
    if words != folder:
        name, base = subject.base()
        if base is None:
            yield Finding("tokenizer", None, f"its base {name}, which has the tokenizer, is not on this machine")
            return
        words = base
    refuse_links(words)
    recorded = None if proof is None else dataclasses.asdict(proof)
    yield from serving(words, folder, recorded, subject.trust_remote_code)


def serving(words: Path, generation: Path, recorded: dict[str, Any] | None, trusted: bool) -> Iterator[Finding]:
    """The tokenizer's files in `words`, the chat template and the stop tokens that serving would take, the latter also
    from `generation`; `recorded`: as `prove` makes it."""
    read = read_tokenizer(words, trusted)
    stops = stop_ids(read, generation)
    shown = ", ".join(f"{read.convert_ids_to_tokens(token)!r} ({token})" for token in stops if 0 <= token < len(read))
    if unknown := [token for token in stops if not 0 <= token < len(read)]:
        yield Finding("stop token", False, f"{generation}: the stop token {unknown[0]} is no token of its tokenizer.")
    elif not stops:
        yield Finding("stop token", None, "neither the tokenizer nor a generation_config.json names one")
    elif recorded is not None and stops != recorded["stop_ids"]:
        before = recorded["stop_ids"]
        yield Finding("stop token", False, f"{generation}: it stops at {shown}; when it was saved, at {before}.")
    else:
        yield Finding("stop token", True, shown)
    if recorded is None:
        yield Finding("tokenizer", None, NOT_OURS)
        return
    same = tokenizer_hash(words) == recorded["tokenizer"]
    said = "as it was saved" if same else f"{words}: the tokenizer's files are not those that were saved."
    yield Finding("tokenizer", same, said)
    same = template_hash(read) == recorded["chat_template"]
    said = "as it was saved" if same else f"{words}: the chat template that serving takes is not the one saved."
    yield Finding("chat template", same, said if recorded["chat_template"] or not same else "none, as it was saved")


def base_files(subject: Subject) -> Iterator[Finding]:
    """The base that an adapter was trained on, by the hashes of its weight files."""
    if not subject.is_adapter:
        return
    name, base = subject.base()
    recorded = (subject.proof.base if subject.proof else {}).get("files")
    if base is None:
        yield Finding("base", None, f"{name} is not on this machine")
    elif not recorded:
        yield Finding("base", None, f"{name} is there; its hashes were not recorded")
    else:
        hashes = weight_hashes(base)
        wrong = sorted(file for file in {*hashes, *recorded} if hashes.get(file) != recorded.get(file))
        said = f"{base / wrong[0]} is not the file that it was trained on." if wrong else f"{base}, {len(hashes)} files"
        yield Finding("base", not wrong, said)


CHECKS: dict[str, Callable[[Subject], Iterator[Finding]]] = {
    "files": files,
    "weights": weights,
    "names and shapes": keys,
    "tokenizer": tokenizer,
    "base": base_files,
    "logits": logits,
}
