"""Which weights are trained: all of them, or low-rank adapters on some layers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from distft.config.schema import Tuning
from distft.errors import UserMistake
from distft.model.mapping import shapes_of
from distft.model.plain import quiet
from distft.weights.store import Overlay, Renamed, Weights, num_elements
from distft.world import seed_of

ALL_LINEAR = "all-linear"


def apply(model: nn.Module, tuning: Tuning, weights: Weights, seed: int) -> tuple[nn.Module, Weights]:
    """Mark what is trained, on a model that was born on meta. Returns the model and all its weights by name.

    full: the model itself. lora: a PEFT model (Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024,
    arXiv:2402.09353; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732) whose adapters are on meta too. Their first values
    are computed on the CPU from the seed and the name alone when an engine reads them, so every engine starts equal.

    Raises:
        UserMistake: `tuning.target` matches no layer, or one that can hold no adapter.
    """
    if tuning.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return model, weights
    base_names = {id(tensor): name for name, tensor in named_tensors(model)}
    wrapped = wrap(model, tuning)
    tensors = dict(named_tensors(wrapped))
    stored_name = {name: base_names[id(tensor)] for name, tensor in tensors.items() if id(tensor) in base_names}
    base = Renamed(weights, stored_name)
    shapes = {name: shape for name, shape in shapes_of(wrapped).items() if name not in stored_name}
    return wrapped, Overlay(base, FreshAdapters(wrapped, shapes, base, seed))


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers; a tied one once, under its first name."""
    persistent = set(shapes_of(model))
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    return [*model.named_parameters(), *buffers]


def wrap(model: nn.Module, tuning: Tuning) -> Any:
    """The PEFT model: adapters on meta, the base frozen. Gradient checkpointing comes later and must not be on yet:
    PEFT would make the embeddings' output require gradients, and every block below the first adapter run backward."""
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.tuners import tuners_utils

    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()), "PEFT comes first"
    check_target(model, tuning.target)
    target = tuning.target if isinstance(tuning.target, str) else list(tuning.target)
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=int(tuning.lora_alpha) if float(tuning.lora_alpha).is_integer() else tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=target,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    tuners_utils._torch_supports_distributed = False  # it would look for DTensors, of which there are none yet
    try:
        with quiet():
            return get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        text = " ".join(str(error).split())
        raise UserMistake(f"tuning.target={tuning.target}: PEFT says: {text[:300]}") from None


def check_target(model: nn.Module, target: str | Sequence[str]) -> None:
    """Refuse a target that reaches no layer, naming the nearest that exist. PEFT passes over such entries in a list."""
    if target == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target, str):
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise UserMistake(f"tuning.target={target!r} is no regular expression: {error}.") from None
        missed = [] if any(pattern.fullmatch(name) for name in names) else [target]
    else:
        missed = [entry for entry in target if not any(name == entry or name.endswith(f".{entry}") for name in names)]
        if not target:
            raise UserMistake(f"tuning.target=[] trains nothing; leave it out for {ALL_LINEAR}.")
    if not missed:
        return
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if holds_matrix(module)})
    close = difflib.get_close_matches(missed[0].rpartition(".")[2], linear, n=3, cutoff=0.5)
    regex = " A string is a regular expression for the whole name, such as '.*q_proj'."
    whole = regex if isinstance(target, str) else ""
    raise UserMistake(
        f"tuning.target: {', '.join(missed)} matches no layer of {type(model).__name__}.{whole} "
        f"{'Did you mean ' + ' or '.join(close) + '?' if close else 'Its linear layers are ' + ', '.join(linear) + '.'}"
    )


def holds_matrix(module: nn.Module) -> bool:
    """Linear layers, among them GPT-2's transposed ones."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and isinstance(weight, Tensor))


class FreshAdapters:
    """The first values of adapters, computed when they are read: nothing is held in memory.

    As in PEFT: A is Kaiming uniform with a = sqrt(5), B is zero, so that training starts from the base model; DoRA's
    magnitudes are the norms of the base's rows; on an embedding it is B that is drawn (normal) and A that is zero.
    """

    def __init__(self, model: nn.Module, shapes: dict[str, tuple[int, ...]], base: Weights, seed: int) -> None:
        self.model, self.shapes, self.base, self.seed = model, shapes, base, seed

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        shape = self.shapes[name]
        stop = num_elements(shape) if length is None else start + length
        if not 0 <= start <= stop <= num_elements(shape):
            raise IndexError(f"{name} has {num_elements(shape)} values; {start} to {stop} was asked for")
        kind = next(part for part in reversed(name.split(".")) if part.startswith("lora_"))
        if kind in ("lora_B", "lora_embedding_A"):
            return torch.zeros(stop - start)
        if kind == "lora_magnitude_vector":
            return self.row_norms(name, start, stop)
        generator = torch.Generator().manual_seed(seed_of(self.seed, xxhash.xxh3_64_intdigest(name.encode())))
        tensor = torch.empty(shape, dtype=torch.float32)
        if kind == "lora_A":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        elif kind == "lora_embedding_B":
            nn.init.normal_(tensor, generator=generator)
        else:
            raise ValueError(f"{name}: no rule says how this kind of adapter starts")
        return tensor.view(-1)[start:stop]

    def row_norms(self, name: str, start: int, stop: int) -> Tensor:
        """L2 norms of the base matrix's rows `start` to `stop` (of its columns where it is stored transposed)."""
        layer = name.partition(".lora_magnitude_vector")[0]
        weight = f"{layer}.base_layer.weight"
        num_rows, num_columns = self.base.shape(weight)
        module = self.model.get_submodule(layer)
        if getattr(module, "fan_in_fan_out", False) or isinstance(module.get_submodule("base_layer"), nn.Embedding):
            matrix = self.base.read(weight).view(num_rows, num_columns).float()
            return torch.linalg.norm(matrix, dim=0)[start:stop]
        rows = self.base.read(weight, start * num_columns, (stop - start) * num_columns)
        return torch.linalg.norm(rows.view(stop - start, num_columns).float(), dim=1)
