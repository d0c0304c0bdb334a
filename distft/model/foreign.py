"""What a model's or an adapter's folder from elsewhere is held to before anything is made of it: it is data.

Nothing here imports torch or reads a tensor: sizes that a configuration claims are compared with the weight files'
headers, which safetensors has checked against the files' own sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distft.errors import UserMistake
from distft.weights.links import refuse_links
from distft.weights.store import INDEX_FILE, SINGLE_FILE, FolderWeights, num_elements, shard_files

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MOST_BYTES = 64 * 1024**2  # of a configuration file
MOST_POSITIONS = 2**28
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size.

    Raises:
        UserMistake: it is none.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserMistake(f"{path} has {path.stat().st_size:,} bytes, more than any configuration. It is refused.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserMistake(f"{path} cannot be read as JSON ({error}). Fetch it again.") from None
    if not isinstance(values, dict):
        raise UserMistake(f"{path} holds no JSON object. Fetch it again.")
    return values


def refuse_pickles(folder: Path, wanted: str, cure: str) -> None:
    """
    Raises:
        UserMistake: the folder lacks the safetensors file `wanted`; names the pickle that lies there instead.
    """
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise UserMistake(
            f"{folder} holds {pickled[0]}, a pickle that could run any code, and no {wanted}. {cure}, where you trust "
            "it, then give the new folder."
        )
    raise UserMistake(f"{folder} has no safetensors weights: no {wanted}.")


def check_model(folder: Path, trust_remote_code: bool = False) -> FolderWeights:
    """The weights of a model's folder, whose files, links and sizes have been found plausible. Reads headers only.

    Raises:
        UserMistake: pickles instead of safetensors, links or names that leave the folder, a configuration whose model
            its weight files cannot hold, a kernel that would be fetched and run.
    """
    refuse_links(folder)
    if not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists():
        cure = "Convert it once with transformers' from_pretrained and save_pretrained"
        refuse_pickles(folder, f"{SINGLE_FILE} and no {INDEX_FILE}", cure)
    weights = FolderWeights(folder, shard_files(folder)[0])
    config = read_json(folder / "config.json")
    if not trust_remote_code:
        refuse_kernels(folder / "config.json", config)
    check_sizes(folder / "config.json", config, weights)
    return weights


def refuse_kernels(path: Path, config: dict[str, Any]) -> None:
    """transformers takes an attention implementation `owner/name` for code to fetch from the Hub and run."""
    for name, value in entries_of(config):
        if name.endswith("attn_implementation") and "/" in json.dumps(value):
            raise UserMistake(
                f"{path}: {name}={value} is code that would be fetched and run. Remove the entry, or read that "
                "code and set model.trust_remote_code=true."
            )


def check_sizes(path: Path, config: dict[str, Any], weights: FolderWeights) -> None:
    """Refuse sizes of a model that is larger than its own weight files, before a model of these sizes is built."""
    names = weights.names()
    stored = sum(num_elements(weights.shape(name)) for name in names)
    for name, value in entries_of(config):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in LAYERS:
            most, what = len(names), f"its weight files hold {len(names):,} tensors"
        elif "position" in name or name == "n_ctx":
            most, what = MOST_POSITIONS, f"no model knows more than {MOST_POSITIONS:,}"
        elif name.endswith(("_size", "_dim", "_rank")) or name.startswith(("num_", "n_")):
            most, what = stored, f"its weight files hold {stored:,} values"
        else:
            most, what = 2**63, "no number in a configuration is that large"
        if value > most:
            raise UserMistake(f"{path}: {name}={value:,}, but {what}. The two do not belong together; it is refused.")
    flat = dict(entries_of(config))
    rows, columns = flat.get("vocab_size"), flat.get("hidden_size") or flat.get("n_embd") or flat.get("d_model")
    if isinstance(rows, int) and isinstance(columns, int) and rows * columns > stored:
        raise UserMistake(
            f"{path}: embeddings of vocab_size={rows:,} times {columns:,} are more than the {stored:,} values of "
            "its weight files. The two do not belong together; it is refused."
        )


def entries_of(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of every entry at any depth; those of the top last, so that they win."""
    for value in config.values():
        if isinstance(value, dict):
            yield from entries_of(value)
    yield from config.items()


def check_adapter(folder: Path) -> FolderWeights:
    """The weights of a PEFT folder, held to the same; PEFT would make matrices of the claimed rank before it reads any.

    Raises:
        UserMistake: pickles instead of safetensors, links that leave the folder, a kind other than LoRA, an entry that
            makes PEFT import a module, a rank that its tensors do not have.
    """
    refuse_links(folder)
    if not (folder / ADAPTER_FILE).exists():
        refuse_pickles(folder, ADAPTER_FILE, "Convert it once with PEFT's from_pretrained and save_pretrained")
    weights = FolderWeights(folder, [ADAPTER_FILE])
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserMistake(
            f"{path}: peft_type={config.get('peft_type')} is not read here, LORA is. Merge it into its base with PEFT."
        )
    if config.get("megatron_config") is not None:
        raise UserMistake(
            f"{path}: megatron_config makes PEFT import the module {config.get('megatron_core')!r}, which is code. "
            "Remove the entry."
        )
    if config.get("layer_replication") is not None:
        raise UserMistake(
            f"{path}: layer_replication, which repeats layers of the base, is not read here. It is refused."
        )
    ranks = {
        weights.shape(name)[0]
        for name in weights.names()
        if name.endswith((".lora_A.weight", ".lora_embedding_A")) and weights.shape(name)
    }
    if not ranks:
        raise UserMistake(f"{folder / ADAPTER_FILE} holds no LoRA matrix: it is no adapter, or an empty one.")
    claimed = config.get("r"), *dict(config.get("rank_pattern") or {}).values()
    for rank in claimed:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= max(ranks):
            found = ", ".join(map(str, sorted(ranks)))
            raise UserMistake(
                f"{path} claims LoRA rank {rank}, but the matrices of {ADAPTER_FILE} have rank {found}. The two do not "
                "belong together; it is refused."
            )
    return weights
