"""From a model on meta to allocated or partitioned parameters under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from distft.errors import UserMistake
from distft.world import World


class Partition:
    """Cuts one parameter after another into the ranks' partitions, so that a whole model never exists anywhere."""

    def __init__(self, config: dict[str, Any]) -> None:
        # The context is not entered: it would patch every module class and cast every tensor made inside.
        self.init = deepspeed.zero.Init(config_dict_or_path=config)

    def __call__(self, parameter: Any) -> None:
        self.init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        parameter.ds_tensor.zero_()


def allocate(
    model: nn.Module, device: torch.device, dtype_of: Callable[[nn.Parameter], torch.dtype], partition: Partition | None
) -> None:
    """Give every parameter and buffer of a model born on meta its memory; ties stay ties."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype_of(parameter), device=device)
                made[parameter] = fresh = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                if partition is not None:
                    partition(fresh)
            module._parameters[key] = made[parameter]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_range(parameter: Any, world: World) -> tuple[int, int]:
    """This rank's (start, length) of a parameter that ZeRO-3 partitioned, without the padding of the last ranks."""
    size = parameter.ds_tensor.ds_numel
    start = min(world.rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def keep_experts_together(model: nn.Module, stage: int) -> None:
    """Experts that are modules of their own see no token on some ranks, and then the ranks' reductions do not match.

    ZeRO-3 can gather and reduce the module around them as one leaf.

    Raises:
        UserMistake: ZeRO-1 and -2 cannot.
    """
    if stage < 3:
        raise UserMistake(
            f"strategy=zero{stage}: the experts of this model are modules of their own, and some may see no token on a "
            "rank, for which DeepSpeed's ZeRO-1 and -2 have no remedy. Use strategy=zero3, fsdp or ddp."
        )
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            set_z3_leaf_module(module, True)
