"""Counts the floating-point operations of whatever runs under `Operations`: matrix products and attention, as called.

The formulas are PyTorch's own (torch.utils.flop_counter), and those that it lacks: attention on a CPU, products that
add to a tensor in place, and the one operator that distft defines. A kernel that multiplies without PyTorch's
dispatcher is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def attention(query: Any, key: Any, value: Any, *arguments: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *arguments: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


def adapted_linear(x: Any, weights: Sequence[Any], biases: Any, a: Any, b: Any, scales: Any, **named: Any) -> int:
    rows = math.prod(x.shape[:-1])
    return sum(2 * rows * matrix.numel() for matrix in (*weights, a, *b))


ALSO: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
}


class Operations(TorchDispatchMode):
    """`with Operations() as counted: …`, then `counted.total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        packet = func._overloadpacket
        if str(packet) == "distft.adapted_linear":
            self.total += adapted_linear(*args, **kwargs)
        elif packet in ALSO:
            self.total += ALSO[packet](*args, **kwargs, out_val=answer)
        elif packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=answer))
        return answer
