"""Which parameters decay, the optimizer over them, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from distft.config.schema import Optim, Schedule


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies: to matrices (and stacks of them), not to norms, biases or other vectors.

    `shape` is that of the whole parameter: an engine may hold a flattened piece of it.
    """
    return len(shape) > 1 and not name.endswith("bias")


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], shapes: Mapping[str, Sequence[int]], optim: Optim
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) or plain SGD, both in their fused form.

    Args:
        named_parameters: the trained parameters as the engine laid them out; all plain tensors (no DTensor beside
            plain ones: neither the fused kernels nor clipping take a mixed list).
        shapes: full shape of each by the same name, from before the engine laid it out.
        optim: the config section.

    Returns:
        An optimizer whose groups each carry `lr_scale`, by which the step's learning rate is multiplied. An engine
        may set the attributes `grad_scale` (divides the gradients) and `found_inf` (1.0: change nothing) on it: the
        kernels read both on the device, so that neither clipping nor skipping a step waits for the host.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters:
        groups[decays(name, shapes[name])].append(parameter)
    param_groups = [
        {"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0, "lr_scale": 1.0}
        for decay, parameters in groups.items()
        if parameters
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(param_groups, lr=optim.lr, fused=True)
    beta1, beta2 = optim.betas
    return torch.optim.AdamW(param_groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, fused=True)


def warmup_steps(num_steps: int, schedule: Schedule) -> int:
    """Steps of warm-up: `schedule.warmup` is a share of all steps below 1, a number of steps from 1 on."""
    return math.ceil(schedule.warmup * num_steps) if schedule.warmup < 1 else int(schedule.warmup)


def lr_at(step: int, num_steps: int, optim: Optim, schedule: Schedule) -> float:
    """Learning rate of step `step` (from 0) of `num_steps`.

    It rises linearly over the warm-up, never being zero, and falls towards `schedule.final * optim.lr`, which it would
    reach one step after the last, so that no step is spent at a rate of zero.
    """
    warmup = warmup_steps(num_steps, schedule)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    fall_from = warmup
    if schedule.name == "wsd":
        fall_from = max(warmup, num_steps - math.ceil(schedule.decay * num_steps))
    progress = min(1.0, max(0, step - fall_from) / max(1, num_steps - fall_from))
    if schedule.name == "constant":
        height = 1.0
    elif schedule.name == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:  # linear, wsd
        height = 1 - progress
    if schedule.name != "constant":
        height = schedule.final + (1 - schedule.final) * height
    return optim.lr * height
