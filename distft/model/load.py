"""From a name to a model: its folder, its tokenizer, its architecture on meta, its blocks and its buffers."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distft.config.schema import Run
from distft.errors import UserMistake
from distft.model.mapping import open_weights
from distft.weights.store import INDEX_FILE, SINGLE_FILE, shard_files

__all__ = [
    "base_of",
    "blocks",
    "build",
    "finish_buffers",
    "load_tokenizer",
    "open_weights",
    "read_config",
    "resolve",
    "restore_ties",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FETCHED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
NOT_FETCHED = ("original/*", "consolidated*", "onnx/*", "openvino/*", "coreml/*", "gguf/*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


# --- where the model lies -------------------------------------------------------------------------------------------


def resolve(run: Run, texts: Callable[[], Iterable[str]]) -> Path:
    """The model's local folder: built (`model=tiny`, its tokenizer trained from `texts`), given, or fetched.

    Raises:
        UserMistake: the folder is no model that can be trained here, or the hub cannot give it; with the cure.
    """
    if run.model.name == "tiny":
        from distft.model.tiny import build_tiny, cache_folder

        return build_tiny(run.model.tiny, texts, cache_folder(run))
    if not run.model.path:
        raise UserMistake("model=hf needs model.path=<folder or hub id>.")
    folder = Path(run.model.path).expanduser()
    if folder.is_dir():
        if run.model.revision:
            raise UserMistake(f"model.revision={run.model.revision} means nothing for the folder {folder}; leave it out.")
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
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise UserMistake(
            f"model.path={folder} holds a PEFT adapter, not a model. Give its base, model.path={base}, or merge the adapter "
            "into it first (PEFT's merge_and_unload, then save_pretrained)."
        )
    if not (folder / "config.json").exists():
        raise UserMistake(f"model.path={folder} holds no config.json, so it is no Hugging Face model.{nearest_folder(folder)}")
    if not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists():
        pickled = sorted(file.name for file in folder.glob("*.bin")) + sorted(file.name for file in folder.glob("*.pt*"))
        if pickled:
            raise UserMistake(
                f"model.path={folder} holds {pickled[0]}, a pickle that could run any code, and no safetensors. Convert it "
                "once with transformers' from_pretrained and save_pretrained, then give the new folder."
            )
        raise UserMistake(f"model.path={folder} holds no {SINGLE_FILE} and no {INDEX_FILE}: its weights are missing.")
    shard_files(folder)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserMistake(f"model.path={folder} holds no tokenizer ({TOKENIZER_FILES[0]}): save the model's tokenizer into it.")
    config = read_config(folder, run.model.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise UserMistake(f"model.path={folder} holds quantised weights, which cannot be trained: give the unquantised model.")


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
    """The folder's fast tokenizer, as it is; the caller settles the chat template.

    Raises:
        UserMistake: there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=run.model.trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise UserMistake(f"The tokenizer of {path}: {complaint(error, run.model.trust_remote_code)}") from None
    if not tokenizer.is_fast:
        raise UserMistake(f"{path} has only a slow tokenizer; a fast one (tokenizer.json) is needed. Convert it and save it there.")
    return tokenizer


# --- the architecture -----------------------------------------------------------------------------------------------


def build(path: Path, run: Run, attention: str | None = None) -> nn.Module:
    """The architecture without weights, under the caller's context (`with strategy.born():`, usually meta).

    Every floating parameter is fp32 until an engine gives it another type. `attention`: the implementation's name as
    transformers knows it (None: its own choice). No cache is kept in forward passes; a final folder gets the base's own configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = read_config(path, run.model.trust_remote_code)
    config.use_cache = False
    try:
        with no_init_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention,
                dtype=torch.float32,
                trust_remote_code=run.model.trust_remote_code,
            )
    except ValueError as error:
        raise UserMistake(f"model.path={path}: {complaint(error, run.model.trust_remote_code)}") from None
    restore_ties(model)
    model.name_or_path = str(path)
    return model


def base_of(model: nn.Module) -> Any:
    """The Hugging Face model itself, also when PEFT wraps it."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def original(module: Any) -> Any:
    """The module that PEFT put an adapter around, or the module itself."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def restore_ties(model: nn.Module) -> None:
    """Make tied parameters one object again: `to_empty` and building without initialisation leave two."""
    base = base_of(model)
    for target, source in getattr(base, "all_tied_weights_keys", {}).items():
        target_module, _, target_key = target.rpartition(".")
        source_module, _, source_key = source.rpartition(".")
        shared = getattr(original(base.get_submodule(source_module)), source_key)
        owner = original(base.get_submodule(target_module))
        if getattr(owner, target_key) is not shared:
            setattr(owner, target_key, shared)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, in order: the model's outermost list of `num_hidden_layers` modules."""
    base = base_of(model)
    config = base.config.get_text_config()
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    inner = {id(nested) for outer in lists for nested in outer.modules() if nested is not outer}
    outermost = [module for module in lists if id(module) not in inner]
    layers = [module for module in outermost if len(module) == getattr(config, "num_hidden_layers", None)]
    candidates = layers or outermost
    if not candidates:
        raise UserMistake(f"{type(base).__name__} has no list of transformer layers, so it cannot be sharded block by block.")
    return list(max(candidates, key=lambda module: sum(1 for _ in module.modules())))


# --- buffers --------------------------------------------------------------------------------------------------------


def finish_buffers(model: nn.Module, device: torch.device) -> None:
    """Give `model`, born on meta, the buffers that are computed and not stored, on `device`; restore ties.

    Rotary frequencies, embedding scales and the like are what the model's constructor makes of its configuration. So
    the constructor runs once more, its parameters on meta, and everything it computed is taken over by name: right for
    every model, whatever it computes, before or after sharding and with or without adapters.
    """
    base = base_of(model)
    with parameters_on_meta():
        fresh = type(base)(base.config)
    computed = {name: module for name, module in fresh.named_modules() if owns_computed_tensors(module)}
    for name, source in computed.items():
        module = original(base.get_submodule(name))
        for key in source._non_persistent_buffers_set:
            buffer = source._buffers.get(key)
            module._buffers[key] = None if buffer is None else buffer.to(device)
        for key, value in vars(source).items():
            if isinstance(value, torch.Tensor):
                setattr(module, key, value.to(device))
    restore_ties(model)


def owns_computed_tensors(module: nn.Module) -> bool:
    return bool(module._non_persistent_buffers_set) or any(isinstance(value, torch.Tensor) for value in vars(module).values())


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside compute their buffers on the CPU in fp32, while their parameters take no memory."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with torch.device("cpu"), no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
