"""Which attention a model gets: the fastest that was seen to be right on a small copy of it.

`varlen` (see distft/model/varlen.py) where a model allows it. A model that needs more than that path can do gets
transformers' own sdpa or eager attention with a block-diagonal mask: slower, and as exact. Documents share a row only
where editing one was seen to leave the others' logits bit-identical.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distft.errors import UserMistake
from distft.model.miniature import FIRST_WORD, LAST_WORD, miniature
from distft.model.varlen import VARLEN, packed_arguments

if TYPE_CHECKING:
    from distft.config.schema import Model


@dataclass(frozen=True)
class AttentionChoice:
    """How a model attends."""

    implementation: str  # name that transformers knows: varlen, sdpa or eager
    packs: bool  # documents may share a row: they were seen to be isolated
    reason: str  # what the user should know; empty where nothing slower was taken


def choose(model_folder: Path, model: Model) -> AttentionChoice:
    """Try what `model.attention` allows on a small copy of this model and take the fastest that is right.

    Raises:
        UserMistake: `model.attention` names an implementation that this model cannot use or gets wrong.
    """
    return choose_for(load_config(model_folder, model), model.attention, model.trust_remote_code, model_folder.name)


def isolated(model_folder: Path, model: Model, choice: AttentionChoice) -> bool:
    """Whether documents in one row leave each other's logits bit-identical under `choice`: tried, see `is_isolated`."""
    small = miniature(load_config(model_folder, model), model.trust_remote_code)
    return small is not None and is_isolated(small, choice.implementation)


def load_config(model_folder: Path, model: Model) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_folder, trust_remote_code=model.trust_remote_code)


def choose_for(config: Any, wanted: str, trust_remote_code: bool = False, name: str = "This model") -> AttentionChoice:
    """`choose` for a configuration; `name` is what messages call the model."""
    small = miniature(config, trust_remote_code)
    candidates = (VARLEN, "sdpa", "eager") if wanted == "auto" else (wanted,)
    if small is None:
        plain = ("sdpa" if has_sdpa(config) else "eager") if wanted == "auto" else wanted
        reason = f"{name}: no small copy could be made to try packing on, so model.attention={plain} is used"
        return AttentionChoice(plain, False, reason)
    found: AttentionChoice | None = None
    complaints: dict[str, str] = {}
    for implementation in candidates:
        complaint = disagreement(small, implementation)
        if complaint:
            complaints[implementation] = complaint
            continue
        reason = ""
        if implementation != VARLEN and wanted == "auto":
            problem = complaints.get(VARLEN, "document boundaries do not reach its attention")
            reason = f"{name}: {problem}; model.attention={implementation} with a mask is used, as exact but slower"
        choice = AttentionChoice(implementation, is_isolated(small, implementation), reason)
        if choice.packs:
            return choice
        found = found or choice
    if found is None:
        problem = "; ".join(f"{implementation}: {complaint}" for implementation, complaint in complaints.items())
        raise UserMistake(f"model.attention={wanted} does not work with {name} ({problem}). Use model.attention=auto.")
    return found


def has_sdpa(config: Any) -> bool:
    """Whether transformers' own class for this configuration says that it can use sdpa."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(known, "_supports_sdpa", False))


def disagreement(model: nn.Module, implementation: str) -> str:
    """Why `implementation` does not compute what the model's own eager attention does; empty where it does.

    Tried on documents longer than every window, one a row.
    """
    ids = words(13)
    try:
        use(model, "eager")
        reference = logits_of(model, ids)
    except (ValueError, NotImplementedError, ImportError):  # no eager code: the implementation is the reference
        reference = None
    try:
        use(model, implementation)
        logits = logits_of(model, ids)
    except Exception as error:  # remote code may raise anything
        return f"{error}".split("\n")[0] or type(error).__name__
    if reference is not None and not near(logits, reference):
        return f"{implementation} attention gives other logits than eager"
    return ""


def is_isolated(model: nn.Module, implementation: str, naive: bool = False) -> bool:
    """Pack three documents; edit the first, then the last. The others' logits must keep every bit.

    Each document's logits must also equal those that it gets alone, which fails where a model counts positions from the
    start of the row. `model`: a miniature. `naive`: pack without saying where documents begin, which must fail.
    """
    lengths = (11, 1, 13)
    try:
        use(model, implementation)
        row = words(sum(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        arguments = (
            {}
            if naive
            else accepted(model, {"position_ids": positions})
            | packed_arguments(model.config, positions, bounds, max(lengths), lengths, torch.float32)
        )
        plain = logits_of(model, row, arguments).split(lengths, dim=1)
        for edited in (0, len(lengths) - 1):
            documents = list(row.split(lengths, dim=1))
            documents[edited] = LAST_WORD + FIRST_WORD - documents[edited]
            logits = logits_of(model, torch.cat(documents, dim=1), arguments).split(lengths, dim=1)
            if any(not torch.equal(plain[other], logits[other]) for other in range(len(lengths)) if other != edited):
                return False
        alone = [logits_of(model, document) for document in row.split(lengths, dim=1)]
        return all(near(packed, single) for packed, single in zip(plain, alone, strict=True))
    except Exception:  # a model whose forward cannot take packed rows is not packed
        return False


def implementation_of(model: nn.Module) -> str:
    """The attention implementation of a Hugging Face model's text part."""
    config: Any = model.config
    return str(config.get_text_config()._attn_implementation)


def use(model: Any, implementation: str) -> None:
    """Switch the implementation.

    Raises:
        ValueError: the model cannot use it.
    """
    model.set_attn_implementation(implementation)
    if implementation_of(model) != implementation:
        raise ValueError(f"its attention cannot be switched to {implementation}")


def accepted(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that the model's forward names: models without positions name none."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}


def words(length: int) -> Tensor:
    """[1, length] token ids that look random and do not depend on the random state."""
    return (torch.arange(length)[None] * 17 + 5) % (LAST_WORD - FIRST_WORD + 1) + FIRST_WORD


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, arguments: dict[str, Any] | None = None) -> Tensor:
    logits: Tensor = model(input_ids=ids, **accepted(model, {"use_cache": False}), **(arguments or {})).logits
    return logits


def near(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(((one - other).abs().max() <= tolerance * other.abs().max()).item())
