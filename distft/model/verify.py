"""Whether a finished folder is what was saved: a model's or an adapter's, made here or elsewhere.

Weights pass through memory a piece at a time. Only the logits need the model itself, so they alone may be left out for
want of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from distft.config.schema import Run
from distft.config.schema.model import Model
from distft.errors import NegativeVerdict, Stop
from distft.model.decode import stop_ids
from distft.model.folder import TOKENIZER_FILES, read_tokenizer
from distft.model.foreign import ADAPTER_CONFIG, ADAPTER_FILE, PICKLES, check_adapter, check_model
from distft.model.load import build
from distft.model.mapping import open_weights
from distft.model.plain import base_of_adapter, load_plain, quiet, tokenizer_folder
from distft.model.probe import NOISE, TOLERANCE, Recorded, logits_of
from distft.model.proof import PROOF_FILE, Proof, template_hash, tokenizer_hash, weight_hashes
from distft.weights.findings import Finding
from distft.weights.store import FolderWeights, Weights, num_elements, shard_files
from distft.weights.write import hash_file

PIECE = 16 * 1024**2  # values read at a time
CODE_AND_WEIGHTS = (".py", ".safetensors", *(pattern[1:] for pattern in PICKLES))
GIB = 1024**3
NOT_OURS = f"the folder has no {PROOF_FILE}: it was not saved by distft, or by a version that wrote none"
BYTES = {"fp32": 4, "bf16": 2}


@dataclass
class Subject:
    """A folder under verification, and what its checks share."""

    folder: Path
    proof: Proof | None
    max_bytes: float
    trust_remote_code: bool
    device: torch.device
    damaged: bool = False  # its files are not what was saved, so the model is not built from them

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).exists()

    def weights(self) -> FolderWeights:
        files = [ADAPTER_FILE] if self.is_adapter else shard_files(self.folder)[0]
        return FolderWeights(self.folder, files)

    def run(self) -> Run:
        """What `build` needs to know of a run."""
        return Run(model=Model(name="hf", path=str(self.folder), trust_remote_code=self.trust_remote_code))

    def base(self) -> tuple[str, Path | None]:
        """An adapter's base by name, and its folder where it is on this machine; nothing is fetched."""
        name, revision = base_of_adapter(self.folder)
        assert name is not None
        if Path(name).is_dir():
            return name, Path(name)
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError:
            found = None
        return name, Path(found).parent if isinstance(found, str) else None


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
        except Stop as error:
            found = [Finding(what, False, str(error))]
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


def keys(subject: Subject) -> Iterator[Finding]:
    """Names and shapes against the base: of an adapter against the base's layers, of a model against its architecture
    and, where the base it was trained from is there, against that."""
    if subject.damaged:
        return
    if subject.is_adapter:
        name, base = subject.base()
        if base is None:
            yield Finding("names and shapes", None, f"its base {name} is not on this machine")
            return
        compare("adapter", shapes_of(subject.weights()), adapter_shapes(subject, base), subject.folder, base)
        yield Finding("names and shapes", True, f"those that PEFT gives this adapter on {base}")
        return
    with torch.device("meta"):
        model = build(subject.folder, subject.run())
    open_weights(subject.folder, model)
    path = Path(str((subject.proof.base if subject.proof else {}).get("path", "")))
    if (path / "config.json").exists():
        check_model(path, subject.trust_remote_code)
        compare("model", shapes_of(subject.weights()), shapes_of(FolderWeights(path)), subject.folder, path)
        yield Finding("names and shapes", True, f"those of {type(model).__name__} and of its base {path}")
    else:
        yield Finding("names and shapes", True, f"those of {type(model).__name__}; its base is not known here")


def shapes_of(stored: Weights) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape(name) for name in stored.names()}


def compare(
    kind: str, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], folder: Path, base: Path
) -> None:
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise NegativeVerdict(
                f"{folder}: {name} has the shape {list(found.get(name, ())) if name in found else 'none (missing)'}, "
                f"but on its base {base} it has {list(wanted[name]) if name in wanted else 'no such name'}: the {kind} "
                "belongs to another base."
            )


def adapter_shapes(subject: Subject, base: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes that PEFT's configuration gives the adapter on its base, built on meta."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    check_model(base, subject.trust_remote_code)
    with torch.device("meta"):
        model: Any = build(base, subject.run())
    try:
        with quiet():
            wrapped = get_peft_model(model, PeftConfig.from_pretrained(str(subject.folder)), low_cpu_mem_usage=True)
    except ValueError as error:
        text = " ".join(str(error).split())[:300]
        raise NegativeVerdict(f"{subject.folder}: the adapter does not fit its base {base}: {text}") from None
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def tokenizer(subject: Subject) -> Iterator[Finding]:
    """The tokenizer's files, the chat template and the stop tokens that serving would take."""
    folder, proof = subject.folder, subject.proof
    if not any((folder / name).exists() for name in TOKENIZER_FILES) and not subject.is_adapter:
        yield Finding("tokenizer", False, f"{folder} holds no tokenizer.")
        return
    if subject.is_adapter and subject.base()[1] is None and tokenizer_folder(folder) != folder:
        yield Finding("tokenizer", None, "its base, which has the tokenizer, is not on this machine")
        return
    read = read_tokenizer(tokenizer_folder(folder), subject.trust_remote_code)
    stops = stop_ids(read, folder)
    words = ", ".join(f"{read.convert_ids_to_tokens(token)!r} ({token})" for token in stops if token < len(read))
    if unknown := [token for token in stops if not 0 <= token < len(read)]:
        yield Finding("stop token", False, f"{folder}: the stop token {unknown[0]} is no token of its tokenizer.")
    elif not stops:
        yield Finding("stop token", None, "neither its tokenizer nor its generation_config.json names one")
    elif proof is not None and stops != proof.stop_ids:
        yield Finding("stop token", False, f"{folder}: it stops at {words}; when it was saved at {proof.stop_ids}.")
    else:
        yield Finding("stop token", True, words)
    if proof is None:
        yield Finding("tokenizer", None, NOT_OURS)
        return
    same = tokenizer_hash(folder) == proof.tokenizer
    said = "as it was saved" if same else f"{folder}: the tokenizer's files are not those that were saved."
    yield Finding("tokenizer", same, said)
    same = template_hash(read) == proof.chat_template
    said = "as it was saved" if same else f"{folder}: the chat template that serving takes is not the one saved."
    yield Finding("chat template", same, said if proof.chat_template or not same else "none, as it was saved")


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


def logits(subject: Subject) -> Iterator[Finding]:
    """What plain transformers or PEFT computes for the recorded prompts, against what was when it was saved."""
    recorded = subject.proof.recorded() if subject.proof else None
    if recorded is None or subject.proof is None:
        yield Finding("logits", None, NOT_OURS if subject.proof is None else "none were recorded")
        return
    if subject.damaged:
        yield Finding("logits", None, "the model is not built from damaged files")
        return
    base = subject.base() if subject.is_adapter else None
    if base is not None and base[1] is None:
        yield Finding("logits", None, f"its base {base[0]} is not on this machine")
        return
    precision = subject.proof.precision
    holds = [subject.weights(), *([FolderWeights(base[1])] if base and base[1] else [])]
    needed = BYTES[precision] * sum(num_elements(part.shape(name)) for part in holds for name in part.names())
    if needed > subject.max_bytes:
        yield Finding(
            "logits",
            None,
            f"the model needs {size(needed)} of memory, verify.max_memory allows {size(subject.max_bytes)}",
        )
        return
    yield compare_logits(subject, recorded, precision, [dtype for part in holds for dtype in types_of(part)])


def size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 1024**2:.2f} MiB"


def types_of(stored: Weights) -> set[torch.dtype]:
    return {stored.dtype(name) for name in stored.names()}


def compare_logits(subject: Subject, recorded: Recorded, precision: str, types: list[torch.dtype]) -> Finding:
    folder = subject.folder
    model = load_plain(folder, precision, subject.device, subject.trust_remote_code)
    low = precision == "bf16" or any(dtype in (torch.bfloat16, torch.float16) for dtype in types)
    tolerance, noise = TOLERANCE["bf16" if low else "fp32"], NOISE["bf16" if low else "fp32"]
    difference = recorded.distance(logits_of(model, recorded))
    if not difference <= tolerance:
        return Finding(
            "logits",
            False,
            f"{folder}: loaded by plain transformers, its logits differ from the trainer's by {difference:.2g} of "
            f"their spread, more than {tolerance:g}. It is not the model that was trained.",
        )
    if subject.is_adapter:
        with model.disable_adapter():
            untrained = recorded.distance(logits_of(model, recorded))
        if difference > max(noise, untrained / 2):
            return Finding(
                "logits",
                False,
                f"{folder}: its logits are {difference:.2g} of their spread from the trainer's, the base model's "
                f"{untrained:.2g}. The adapters do not do what they did in training.",
            )
    count = f"{recorded.positions.numel()} positions of {recorded.input_ids.shape[0]} prompts"
    said = f"{difference:.1g} of their spread from the trainer's at {count} ({tolerance:g} is allowed)"
    return Finding("logits", True, said, difference)


CHECKS: dict[str, Callable[[Subject], Iterator[Finding]]] = {
    "files": files,
    "weights": weights,
    "names and shapes": keys,
    "tokenizer": tokenizer,
    "base": base_files,
    "logits": logits,
}
