"""From a name to a model's local folder: found, fetched or built, and checked before anything is made of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distft.config.schema import Run
from distft.errors import UserMistake
from distft.model.foreign import ADAPTER_CONFIG, check_model, read_json
from distft.weights.store import FolderWeights, num_elements, shard_files

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
NOT_FETCHED = ("original/*", "consolidated*", "onnx/*", "openvino/*", "coreml/*", "gguf/*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve(run: Run, texts: Callable[[], Iterable[str]]) -> Path:
    """The model's local folder: built (`model=tiny`, its tokenizer trained from `texts`), given, or fetched.

    Raises:
        UserMistake: the folder is no model that can be trained here, or the hub cannot give it; with the cure.
    """
    if run.model.name == "tiny":
        from distft.cache import cache_folder
        from distft.model.tiny import build_tiny

        return build_tiny(run.model.tiny, texts, cache_folder(run.data))
    if not run.model.path:
        raise UserMistake("model=hf needs model.path=<folder or hub id>.")
    folder = Path(run.model.path).expanduser()
    if folder.is_dir():
        if run.model.revision:
            raise UserMistake(f"model.revision={run.model.revision} means nothing for a folder; leave it out.")
        folder = folder.absolute()
    else:
        folder = fetch(run, folder)
    check_folder(folder, run)
    return folder


def fetch(run: Run, missing: Path) -> Path:
    """Fetch a hub id: safetensors, configuration and tokenizer only."""
    path = str(run.model.path)
    if not HUB_ID.fullmatch(path) or missing.exists():
        raise UserMistake(f"model.path={path} is no folder, and no hub id either.{nearest_folder(missing)}")
    import huggingface_hub
    from huggingface_hub import errors

    code = ("*.py",) if run.model.trust_remote_code else ()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, revision=run.model.revision, allow_patterns=[*FETCHED, *code], ignore_patterns=list(NOT_FETCHED)
            )
        )
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on its page, then log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {run.model.revision}: correct model.revision"
    except errors.RepositoryNotFoundError:
        reason = "the hub knows no such model, or you may not see it (`hf auth login`)"
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"the hub cannot be reached and the model is not in the local cache ({first_line})"
    except Exception as error:  # the HTTP library's own failures are no OSError in every version
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests"):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__})"
    raise UserMistake(f"model.path={path}: {reason}. A local folder works without the hub.{nearest_folder(missing)}")


def nearest_folder(missing: Path) -> str:
    """A sentence naming the existing model folder that was most likely meant, or nothing."""
    parent = missing.absolute().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    try:
        folders = [path.name for path in parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    part = missing.absolute().relative_to(parent).parts[0]
    close = difflib.get_close_matches(part, folders, n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""


def check_folder(folder: Path, run: Run) -> None:
    """Everything that a folder must have before anything is built from it; each complaint has its cure."""
    adapter = folder / ADAPTER_CONFIG
    if adapter.exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserMistake(
            f"model.path={folder} holds a PEFT adapter, not a model. Give its base, model.path={base}, or merge the "
            "adapter into it first (PEFT's merge_and_unload, then save_pretrained)."
        )
    if not (folder / "config.json").exists():
        raise UserMistake(f"model.path={folder} holds no config.json: no Hugging Face model.{nearest_folder(folder)}")
    try:
        check_model(folder, run.model.trust_remote_code)
    except UserMistake as mistake:
        raise UserMistake(f"model.path: {mistake}") from None
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserMistake(f"model.path={folder} holds no tokenizer: save the model's tokenizer into it.")
    config = read_config(folder, run.model.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise UserMistake(f"model.path={folder} holds quantised weights: give the unquantised model.")


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The model's configuration.

    Raises:
        UserMistake: this version of transformers does not know the model, or its own code is not trusted.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise UserMistake(f"model.path={folder}: {complaint(error, trust_remote_code)}") from None


def complaint(error: Exception, trust_remote_code: bool) -> str:
    """transformers' own words in one line, with the cure where the model brings its own code."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not trust_remote_code:
        return "it brings its own Python code. Read that code, then set model.trust_remote_code=true to run it."
    return f"transformers cannot read it: {text[:400]}"


def load_tokenizer(path: Path, run: Run) -> Any:
    """The tokenizer of a run's model, as it is; the caller settles the chat template."""
    return read_tokenizer(path, run.model.trust_remote_code)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's fast tokenizer.

    Raises:
        UserMistake: there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise UserMistake(f"The tokenizer of {folder}: {complaint(error, trust_remote_code)}") from None
    if not tokenizer.is_fast:
        raise UserMistake(f"{folder} has only a slow tokenizer, but a fast one (tokenizer.json) is needed: convert it.")
    return tokenizer


def num_parameters(folder: Path) -> int:
    """Elements of all stored weights, from the files' headers."""
    weights = FolderWeights(folder, shard_files(folder)[0])
    return sum(num_elements(weights.shape(name)) for name in weights.names())
