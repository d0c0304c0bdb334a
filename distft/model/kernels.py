"""Better RMSNorm, RoPE and SwiGLU/GeGLU than the models' own, put on instances and never on classes.

On CUDA they are the fused kernels of liger-kernel (Hsu et al. 2024), whose own `apply_liger_kernel_to_<model>` knows
models by name and replaces functions for the whole process, and torch's own RMSNorm where that is the same; elsewhere
those of `distft.model.lean`, which keep less for the backward pass. A kind of layer is recognised by its shape, tried
on a small copy of the model on the same device, forward and backward, and taken only if the copy's logits and gradients
stay what they were.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from distft.errors import UserMistake
from distft.model.miniature import FIRST_WORD, LAST_WORD, miniature

Patch = Callable[[nn.Module], bool]
"""Puts a kernel on one module; False where the module is not of a kind that it knows."""

TOLERANCE = 1e-3  # of the largest value; fp32 with another order of sums stays a hundred times below


def apply(model: Any, mode: str, device: torch.device) -> list[str]:
    """Put them on the layers of `model`, also on meta or wrapped by PEFT. Returns what the user should know.

    mode: `auto` takes fused kernels on CUDA where liger-kernel is installed, else plain torch's; `liger` insists, and
    takes its RMSNorm too; `none` leaves the model alone.

    Raises:
        UserMistake: `liger` where it cannot be had.
    """
    if mode == "none":
        return []
    missing = why_not(device)
    if missing and mode == "liger":
        raise UserMistake(f"model.kernels=liger {missing} Use model.kernels=auto or none.")
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    trusted = type(causal).__module__.startswith("transformers_modules")
    small = miniature(causal.config, trust_remote_code=trusted)
    if small is None:
        note = "model.kernels: no small copy of this model could be made to check fused kernels on, so none are used"
        return [] if missing else [note]
    taken = proven(small, device, lean_kinds() if missing else fused_kinds(mode == "auto"))
    for patch in taken.values():
        for module in causal.modules():
            patch(module)
    if not taken and mode == "liger":
        raise UserMistake("model.kernels=liger knows no layer of this model. Use model.kernels=auto or none.")
    return [f"Fused kernels: {', '.join(taken)}"] if taken and not missing else []


def why_not(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a CUDA GPU."
    try:
        installed = find_spec("liger_kernel.ops") is not None
    except ModuleNotFoundError:
        installed = False
    return "" if installed else "needs the package liger-kernel (pip install 'distft[kernels]')."


def proven(small: nn.Module, device: torch.device, kinds: dict[str, list[Patch]]) -> dict[str, Patch]:
    """Those of `kinds` under which a copy of `small` on `device` computes what it did, by name; `small` is left as it
    was."""
    trial = copy.deepcopy(small).to(device).train()
    expected = outcome(trial)
    taken: dict[str, Patch] = {}
    for name, variants in kinds.items():
        for patch in variants:
            before = {module: vars(module).get("forward") for module in trial.modules()}
            known = [patch(module) for module in trial.modules()]
            if any(known) and same(outcome(trial), expected):
                taken[name] = patch
                break
            for module, forward in before.items():
                put_back(module, forward)
    return taken


def put_back(module: nn.Module, forward: Any) -> None:
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


NORMS = [(0.0, "llama"), (1.0, "gemma")]  # offset of the weight, and where it casts to fp32


def fused_kinds(may_be_torchs: bool) -> dict[str, list[Patch]]:
    """Patches by name, Liger's but for RMSNorm where it may be torch's; of several variants the first that proves right
    is taken."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerSiLUMulFunction

    def of_liger(states: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        # Not in place: with residuals behind the norm the incoming gradient is needed once more.
        out: Tensor = LigerRMSNormFunction.apply(states, weight, eps, offset, casting, False, None)
        return out

    normed = functools.partial(torchs_or, of_liger) if may_be_torchs else of_liger
    return {
        "RMSNorm": [functools.partial(fuse_norm, function=normed, variant=variant) for variant in NORMS],
        "RoPE": [fuse_rotary],
        "SwiGLU": [functools.partial(fuse_gated, function=LigerSiLUMulFunction.apply)],
        "GeGLU": [functools.partial(fuse_gated, function=LigerGELUMulFunction.apply)],
    }


def torchs_or(
    own: Callable[..., Tensor], states: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> Tensor:
    """RMSNorm by torch's kernel where that takes it: to start one of Triton's costs the host several times as much."""
    if offset or states.dtype != weight.dtype or states.device.type != "cuda":
        return own(states, weight, eps, offset, casting)
    out: Tensor = torch.ops.aten._fused_rms_norm(states, weight.shape, weight, eps)[0]
    return out


def lean_kinds() -> dict[str, list[Patch]]:
    """The same in plain torch. The rotary embedding keeps nothing as it is."""
    from distft.model.lean import Gated, Normed

    normed = functools.partial(torchs_or, Normed.apply)
    return {
        "RMSNorm": [functools.partial(fuse_norm, function=normed, variant=variant) for variant in NORMS],
        "SwiGLU": [functools.partial(fuse_gated, function=lambda gate, up: Gated.apply(gate, up, "silu"))],
        "GeGLU": [functools.partial(fuse_gated, function=lambda gate, up: Gated.apply(gate, up, "gelu"))],
    }


def outcome(model: nn.Module) -> list[Tensor]:
    """Logits and every gradient of a pass over a few tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(FIRST_WORD, LAST_WORD, device=device)[None]
    model.zero_grad()
    logits = model(input_ids=ids).logits.float()
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logits.detach(), *(gradient.clone() for gradient in gradients)]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    if len(got) != len(expected):
        return False
    return all(
        bool(((one - other).abs().max() <= TOLERANCE * other.abs().max()).item())
        for one, other in zip(got, expected, strict=True)
    )


def fuse_norm(module: nn.Module, function: Callable[..., Tensor], variant: tuple[float, str]) -> bool:
    """RMSNorm (Zhang & Sennrich 2019) with a weight. `variant`: of NORMS. Under autocast its output is of that type."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor):
        return False
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if eps is None:
        return False

    def forward(self: Any, states: Tensor) -> Tensor:
        out = function(states, self.weight, eps, *variant)
        device = out.device.type
        # What comes behind is a product under autocast: it is cast here, and not by each of those that take it.
        if out.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
            return out.to(torch.get_autocast_dtype(device))
        return out

    module.forward = types.MethodType(forward, module)
    return True


def fuse_gated(module: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """down(act(gate(x)) * up(x)) (Shazeer 2020), its projections called as modules, adapters included."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False

    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(function(self.gate_proj(x), self.up_proj(x)))
        return out

    module.forward = types.MethodType(forward, module)
    return True


def fuse_rotary(module: nn.Module) -> bool:
    """Rotary embedding (Su et al. 2021): this instance calls the fused one in place of its Python module's function."""
    forward = type(module).forward
    name = "apply_rotary_pos_emb"
    if not isinstance(forward, types.FunctionType) or name not in forward.__code__.co_names:
        return False
    original = forward.__globals__.get(name)
    if original is None or list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    names = {**forward.__globals__, name: rotate}
    changed = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(changed, module)
    return True


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q: [rows, heads, length, size], k: [rows, key heads, length, size], turned by position."""
    from liger_kernel.ops import LigerRopeFunction

    # The kernel writes over its input, which selective checkpointing may have kept.
    copies = (tensor.transpose(1, 2).clone().transpose(1, 2) for tensor in (q, k))
    rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(*copies, cos, sin, None, unsqueeze_dim)
    return rotated
