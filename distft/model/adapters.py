"""LoRA layers that compute base and adapter together, put on PEFT's layers one by one and never on their classes.

Siblings (q, k, v; gate, up) are layers of one parent module that are fed the identical tensor. The first that is called
computes the outputs of all, and the others take theirs. Which layers those are is found out on a small copy of the
model, whose logits and adapter gradients have to stay what PEFT's own path makes of them.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distft.model.lora import Copies, adapted_linear
from distft.model.miniature import FIRST_WORD, LAST_WORD, miniature
from distft.model.plain import quiet

TOLERANCE = 1e-5  # of the largest value, in fp32

Siblings = dict[str, list[tuple[str, ...]]]
"""Names of child layers that share their input, by the kind of parent."""


def apply(model: Any, compiled: bool = False) -> list[str]:
    """Give the LoRA layers of `model`, also on meta, their fused forward. Returns what the user should know.

    A model without adapters is left alone. PEFT's own path stays on layers with dropout, DoRA, several or merged
    adapters, trained or quantised bases and on everything but plain linear layers; their activations are no longer
    cast to the adapters' type and back under autocast. Call it once, after PEFT has wrapped `model`.

    compiled: the blocks will be compiled. PEFT's own path stays: torch.compile makes its own kernels of that one, and
    would compile every block anew for forwards that are put on single layers.
    """
    if not hasattr(model, "peft_config"):
        return []
    leave_activations_uncast(model)
    if compiled or not any(adapter_of(module) for module in model.modules()):
        return []
    causal = model.get_base_model()
    trusted = type(causal).__module__.startswith("transformers_modules")
    siblings = proven(causal.config, model.active_peft_config, trusted)
    if isinstance(siblings, str):
        return [f"LoRA: {siblings}; PEFT's own path is used, slower"]
    fuse(model, siblings)
    return []


# --- layers ----------------------------------------------------------------------------------------------------------


def adapter_of(layer: Any) -> str | None:
    """The name of the one plain adapter that `layer` adds to a frozen linear layer; None for every other module."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_bias[names[0]]:
        return None
    name: str = names[0]
    frozen = not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    dropout = layer.lora_dropout[name]
    return name if frozen and (isinstance(dropout, nn.Identity) or dropout.p == 0) else None


@dataclass(eq=False)
class Member:
    """One LoRA layer; weights are read from their modules at each call, where the engines put what was gathered."""

    layer: Any
    base: nn.Linear
    a: nn.Linear
    b: nn.Linear
    adapter: str

    @classmethod
    def of(cls, layer: Any, adapter: str) -> Member:
        return cls(layer, layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter], adapter)

    @property
    def plain(self) -> bool:
        """Whether this adapter and no other is asked for at the moment, and lies beside the base."""
        layer = self.layer
        return not layer.disable_adapters and not layer.merged and layer.active_adapters == [self.adapter]

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight, looked at and not read: under ZeRO-3 to read `base.weight` is to gather it."""
        return next(self.base.parameters())

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO-3 keeps the weights in pieces. Where a layer's forward reads another module's weight, DeepSpeed
        gathers it and notes it as that layer's (an external parameter) for all later passes, forward and backward."""
        return hasattr(self.weight, "ds_id")


class Group:
    """Layers that share their input. Outputs made ahead are held until they are taken, or until the parent is done."""

    def __init__(self, members: list[Member], all_groups: list[Group]) -> None:
        self.members = members
        self.all_groups = all_groups  # of the model, this one among them
        all_groups.append(self)
        self.low: Copies | None = None  # of the adapters, kept from pass to pass
        self.low_state: list[tuple[int, int]] = []  # in which state of theirs it was made
        self.input: Tensor | None = None
        self.state: tuple[int, bool] = (0, False)
        self.outputs: dict[Member, Tensor] = {}

    def output(self, member: Member, x: Tensor) -> Tensor:
        """What `member` makes of `x` [..., in]."""
        # ZeRO-3 gathers what belongs to the layer that is called, and its hooks hand every layer a tensor of its own.
        if member.partitioned or x.is_inference():
            return computed([member], x)[0]
        if len(self.members) == 1:
            return computed(self.members, x, self.copies(x))[0]
        state = (x._version, torch.is_grad_enabled())
        if self.input is not x or self.state != state or member not in self.outputs:
            self.drop()
            self.outputs = dict(zip(self.members, computed(self.members, x, self.copies(x)), strict=True))
            self.input, self.state = x, state
        output = self.outputs.pop(member)
        if not self.outputs:
            self.drop()
        return output

    def drop(self, *_: object) -> None:
        self.input, self.outputs = None, {}

    def adapters(self) -> list[Tensor]:
        return [half.weight for member in self.members for half in (member.a, member.b)]

    def copies(self, x: Tensor) -> Copies | None:
        """The adapters in the type that `x` is computed in; None where that is their own."""
        dtype, adapters = compute_dtype(x), self.adapters()
        if type(x) is not Tensor or all(adapter.dtype == dtype for adapter in adapters):
            return None  # a fake one only counts: what it is given is none to keep
        if self.low is None or self.low.a.dtype != dtype or self.low_state != state(adapters):
            cast_together(self.all_groups, dtype)
        return self.low


@torch.no_grad()
def cast_together(groups: list[Group], dtype: torch.dtype) -> None:
    """Renew `low` of all groups at once.

    Casts of each on its own, forward, backward and of its gradient, were 1,400 kernels in a step of an 8B model.
    """
    targets, sources = [], []
    for group in groups:
        downs = [member.a.weight for member in group.members]
        ups = [member.b.weight for member in group.members]
        if group.low is None or group.low.a.dtype != dtype or group.low.a.device != downs[0].device:
            rows = sum(down.shape[0] for down in downs)
            a = downs[0].new_empty((rows, downs[0].shape[1]), dtype=dtype)
            group.low = Copies(a, [torch.empty_like(up, dtype=dtype) for up in ups])
        group.low_state = state(group.adapters())
        targets += [*group.low.a.split([down.shape[0] for down in downs]), *group.low.b]
        sources += [*downs, *ups]
    torch._foreach_copy_(targets, sources)


def state(adapters: list[Tensor]) -> list[tuple[int, int]]:
    return [(adapter.data_ptr(), adapter._version) for adapter in adapters]


def computed(members: list[Member], x: Tensor, copies: Copies | None = None) -> tuple[Tensor, ...]:
    return adapted_linear(
        x.to(compute_dtype(x)),
        [member.base.weight for member in members],
        [member.base.bias for member in members],
        [member.a.weight for member in members],
        [member.b.weight for member in members],
        [float(member.layer.scaling[member.adapter]) for member in members],
        copies,
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype


def under_autocast(x: Tensor) -> bool:
    device = x.device.type  # meta, when shapes alone are asked for, has no autocast
    return device != "meta" and torch.is_autocast_enabled(device)


def fused_forward(group: Group, member: Member, own: Callable[..., Tensor], x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """In place of `own`, PEFT's forward. torch.compile makes its own kernels of that one."""
    if args or kw or torch.compiler.is_compiling() or not member.plain or member.weight.dtype != compute_dtype(x):
        return own(x, *args, **kw)
    if torch.is_grad_enabled() and not x.requires_grad and member.partitioned:
        # In the first block: nothing passes back through the base, but fused it would be gathered for that once more.
        return own(x)
    return group.output(member, x)


def fuse(model: nn.Module, siblings: Siblings) -> None:
    all_groups: list[Group] = []
    for parent in model.modules():
        found = {name: adapter_of(child) for name, child in parent.named_children()}
        members = {name: Member.of(getattr(parent, name), adapter) for name, adapter in found.items() if adapter}
        shared = siblings.get(kind_of(parent), [])
        groups = [[members.pop(name) for name in names if name in members] for names in shared]
        for together in filter(None, groups):
            install(Group(together, all_groups))
        if any(len(together) > 1 for together in groups):
            parent.register_forward_hook(forget, always_call=True)
        for member in members.values():
            install(Group([member], all_groups))


def install(group: Group) -> None:
    for member in group.members:
        member.layer.forward = functools.partial(fused_forward, group, member, member.layer.forward)


def forget(parent: nn.Module, *_: object) -> None:
    """Let go of outputs that no sibling came for, also where the parent's pass was cut short (a recomputation is)."""
    if torch.compiler.is_compiling():  # nothing is held then
        return
    for child in parent.children():
        forward = vars(child).get("forward")
        if isinstance(forward, functools.partial) and forward.func is fused_forward:
            forward.args[0].drop()


def leave_activations_uncast(model: nn.Module) -> None:
    """PEFT casts a layer's input to the adapter's type; under autocast the adapter casts it back at once."""
    from peft.tuners.lora.layer import Linear

    layers: list[Any] = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        if not layer.lora_variant:
            layer._cast_input_dtype = functools.partial(cast_unless_autocast, layer._cast_input_dtype)


def cast_unless_autocast(cast: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if under_autocast(x) else cast(x, dtype)


# --- proof -----------------------------------------------------------------------------------------------------------


def proven(config: Any, adapters: Any, trusted: bool) -> Siblings | str:
    """Which layers share their input, if a small copy computes what PEFT does; otherwise why not.

    config: of the base model. adapters: its PEFT configuration, put on every linear layer of the copy.
    """
    from peft import get_peft_model

    small = miniature(config, trusted, num_experts=4)  # the copy that the head is checked on
    if small is None:
        return "no small copy of this model could be made to check the fused layers on"
    adapters = copy.deepcopy(adapters)
    adapters.target_modules, adapters.exclude_modules = "all-linear", None
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        trial: Any = get_peft_model(copy.deepcopy(small), adapters).eval()
        for name, parameter in trial.named_parameters():
            if "lora_B" in name:  # zero from birth, and then A would have no gradient
                nn.init.normal_(parameter, std=0.1)
    with watched(trial) as siblings:
        expected = outcome(trial)
    fuse(trial, siblings)
    if not same(outcome(trial), expected):
        return "the fused layers do not compute what PEFT's do on a small copy of this model"
    return siblings


def kind_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class watched:
    """Within, record which layers of one parent are fed the identical tensor; afterwards the answer is filled in."""

    def __init__(self, model: nn.Module) -> None:
        self.siblings: Siblings = {}
        self.seen: dict[str, list[set[tuple[str, ...]]]] = defaultdict(list)
        self.hooks: list[Any] = []
        for parent in model.modules():
            children = {name: child for name, child in parent.named_children() if adapter_of(child)}
            if len(children) > 1:
                self.watch(parent, children)

    def watch(self, parent: nn.Module, children: dict[str, nn.Module]) -> None:
        fed: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:
                fed[name] = inputs[0]

        def conclude(module: nn.Module, *_: object) -> None:
            by_input: dict[int, list[str]] = defaultdict(list)
            for name, tensor in fed.items():
                by_input[id(tensor)].append(name)
            self.seen[kind_of(module)].append({tuple(names) for names in by_input.values() if len(names) > 1})
            fed.clear()

        self.hooks.append(parent.register_forward_hook(conclude))
        for name, child in children.items():
            self.hooks.append(child.register_forward_pre_hook(functools.partial(note, name)))

    def __enter__(self) -> Siblings:
        return self.siblings

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for kind, calls in self.seen.items():
            agreed = set.intersection(*calls)
            if agreed:
                self.siblings[kind] = sorted(agreed)


def outcome(model: Any) -> list[Tensor]:
    """Logits and the gradients of all adapters of a pass over a few tokens."""
    model.zero_grad()
    logits = model(input_ids=torch.arange(FIRST_WORD, LAST_WORD)[None]).logits
    logits.square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in trained]
    return [logits.detach(), *gradients]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(error <= TOLERANCE for error in errors(got, expected))


def errors(got: list[Tensor], expected: list[Tensor]) -> Iterator[float]:
    for one, other in zip(got, expected, strict=True):
        yield float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
