"""From a model on meta to one with weights, for engines whose ranks hold whole tensors or rows of them."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from distft.weights.store import Weights


def is_dtensor(tensor: Any) -> bool:
    """Whether FSDP2 laid this tensor over the ranks. Asking does not import what makes one (sympy comes with it)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def set_dtypes(module: nn.Module, precision: str) -> None:
    """fp32 for trained parameters; frozen ones bf16 on bf16 runs, else fp32. On meta, so nothing is copied."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            half = precision == "bf16" and not parameter.requires_grad
            parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)


def has_separate_experts(names: Iterable[str]) -> bool:
    """Whether experts are modules of their own, so that a pass may leave some of their parameters without gradients."""
    return any(re.search(r"\.experts\.\d+\.", name) for name in names)


def empty_on(module: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer of `module` uninitialised memory on `device`; tied parameters stay tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    parameters: dict[int, nn.Parameter] = {}
    for submodule in module.modules():
        for key, parameter in submodule.named_parameters(recurse=False):
            owners[id(parameter)].append((submodule, key))
            parameters[id(parameter)] = parameter
    if any(map(is_dtensor, parameters.values())):
        module.to_empty(device=device)  # FSDP2 has to see it
        made = {number: getattr(*owners[number][0]) for number in parameters}
    else:  # torch's own way would import sympy for a tensor on meta
        for submodule in module.modules():
            for key, buffer in submodule.named_buffers(recurse=False):
                submodule._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        made = {number: memory_for(parameter, device) for number, parameter in parameters.items()}
    for number, parameter in made.items():
        for owner, key in owners[number]:
            setattr(owner, key, parameter)


def memory_for(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def local_rows(parameter: Any) -> tuple[Tensor, int]:
    """What this rank holds of `parameter`, and the flat index in the whole tensor at which it starts.

    A DTensor is split along its first dimension as `torch.chunk` does: equal rows on the first ranks, fewer or none
    on the last.
    """
    if not is_dtensor(parameter):
        return parameter.detach(), 0
    from torch.distributed.tensor import Shard

    shard_dim = parameter.device_mesh.ndim - 1
    assert parameter.placements[shard_dim] == Shard(0), f"rows are expected, not {parameter.placements}"
    num_ranks, rank = parameter.device_mesh.size(shard_dim), parameter.device_mesh.get_local_rank(shard_dim)
    num_rows = parameter.shape[0]
    rows_per_rank = -(-num_rows // num_ranks)
    first_row = min(rank * rows_per_rank, num_rows)
    with torch.no_grad():
        local = parameter.to_local()
    assert local.shape[0] == min(rows_per_rank, num_rows - first_row)
    return local, first_row * (parameter.numel() // max(1, num_rows))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are stored with the weights; the others are computed."""
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, buffer


@torch.no_grad()
def read_weights(model: nn.Module, weights: Weights) -> None:
    """Fill every parameter and persistent buffer of `model` by name; a rank reads no more of a tensor than it holds."""
    for name, parameter in model.named_parameters():
        local, start = local_rows(parameter)
        if local.numel():
            local.copy_(weights.read(name, start, local.numel()).view(local.shape))
    for name, buffer in persistent_buffers(model):
        buffer.copy_(weights.read(name).view(buffer.shape))
