"""A model folder loaded as anyone would load it: by transformers, or by PEFT over its base. Nothing of training."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distft.errors import UserMistake
from distft.model.folder import TOKENIZER_FILES, complaint
from distft.model.foreign import ADAPTER_CONFIG, check_adapter, check_model, read_json

PEFT_TO_ITSELF = (
    "`is_gradient_checkpointing` is deprecated",
    "fan_in_fan_out is set to",
    r"The following \w+_pattern keys did not match",
)
"""Warnings about old names that PEFT uses and settings that it makes by itself."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_plain(folder: Path, precision: str, device: torch.device, trust_remote_code: bool = False) -> Any:
    """The model of a plain Hugging Face or PEFT folder on `device`, in evaluation mode.

    Weights are read from safetensors alone: a folder of pickles is refused before either library looks at it.

    Raises:
        UserMistake: transformers cannot read the folder, an adapter's base is not there, or a folder claims what its
            files do not hold.
    """
    from transformers import AutoModelForCausalLM

    base, revision = base_of_adapter(folder)
    if base is not None:
        check_adapter(folder)
    if base is None or Path(base).is_dir():
        check_model(folder if base is None else Path(base), trust_remote_code)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                base or folder,
                revision=revision,
                dtype=DTYPES[precision],
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
            if base is not None:
                from peft import PeftModel

                importlib.import_module("torch.distributed.tensor")  # PEFT looks there and does not import it
                model = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=True)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        raise UserMistake(f"{base or folder}: {complaint(error, trust_remote_code)}") from None
    return model.to(device).eval()


def base_of_adapter(folder: Path) -> tuple[str | None, str]:
    """The base model of a PEFT folder and its revision; None for a folder that is a model itself.

    Raises:
        UserMistake: the base's folder is gone.
    """
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None, "main"
    config = read_json(path)
    base = str(config.get("base_model_name_or_path"))
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserMistake(f"{folder} adapts {base}, which is gone: correct base_model_name_or_path in {path}.")
    return base, config.get("revision") or "main"


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer lies: beside the model, or, for an adapter saved without one, with its base."""
    has_tokenizer = any((folder / file).exists() for file in TOKENIZER_FILES)
    base = None if has_tokenizer else base_of_adapter(folder)[0]
    return folder if base is None else Path(base)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars for every read, PEFT without the warnings that concern itself."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in PEFT_TO_ITSELF:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
