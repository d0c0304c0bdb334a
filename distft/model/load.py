"""The model's architecture: born on meta, its blocks, its ties, and the buffers that are computed, not stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distft.config.schema import Run
from distft.errors import UserMistake
from distft.model.folder import complaint, load_tokenizer, read_config, resolve
from distft.model.mapping import open_weights

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


def build(path: Path, run: Run, attention: str | None = None) -> nn.Module:
    """The architecture without weights: every parameter and buffer on meta.

    Every floating parameter is fp32 until an engine gives it another type. `attention`: the implementation's name as
    transformers knows it (None: its own choice). Forward passes keep no cache; a final folder gets the base's own
    configuration.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(path, run.model.trust_remote_code)
    config.use_cache = False
    try:
        with parameters_on_meta():  # computing a buffer on meta would import sympy, two seconds
            model: Any = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention,
                dtype=torch.float32,
                trust_remote_code=run.model.trust_remote_code,
            )
    except ValueError as error:
        raise UserMistake(f"model.path={path}: {complaint(error, run.model.trust_remote_code)}") from None
    for module in model.modules():
        module._buffers.update({key: value.to("meta") for key, value in module._buffers.items() if value is not None})
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
    """The transformer layers, in order: the model's outermost list of `num_hidden_layers` modules, together with any
    other outermost list of the same kind of module (models of two stacks)."""
    base = base_of(model)
    config = base.config.get_text_config()
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    inner = {id(nested) for outer in lists for nested in outer.modules() if nested is not outer}
    outermost = [module for module in lists if id(module) not in inner]
    candidates = [module for module in outermost if len(module) == getattr(config, "num_hidden_layers", 0)] or outermost
    if not candidates:
        raise UserMistake(f"model.path: {type(base).__name__} has no list of layers to shard by; give another model.")
    sizes = [len(list(module.modules())) for module in candidates]
    kinds = {type(block) for block in candidates[sizes.index(max(sizes))]}
    return [block for stack in outermost if {type(block) for block in stack} <= kinds for block in stack]


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
    plain = any(isinstance(value, torch.Tensor) for value in vars(module).values())
    return plain or bool(module._non_persistent_buffers_set)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside compute their buffers on the CPU in fp32, while their parameters take no memory."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        with torch.device("cpu"), no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
