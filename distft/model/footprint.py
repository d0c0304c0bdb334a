"""What a model keeps in memory for its backward pass, counted block by block before it has weights.

The model's own forward pass runs once on fake tensors (torch's FakeTensorMode), which have shapes, types, a device and
storages, but no values: seconds on any machine, no memory. What is still alive when the pass has ended is what is kept,
whoever keeps it: autograd, a checkpoint's cache or an autograd function's own context.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distft.model.varlen import band


class Numbers(NamedTuple):
    """In which types an engine computes."""

    trained: torch.dtype = torch.float32  # of trained parameters during a pass
    frozen: torch.dtype = torch.float32
    autocast: bool = False  # bf16 autocast around the pass


@dataclass(frozen=True)
class Footprint:
    """Bytes alive at the end of a forward pass; parameters, buffers and the batch itself are not among them."""

    blocks: tuple[int, ...]  # made inside each block
    rest: int  # made outside the blocks: embeddings, last norm, the head's gradients
    rest_peak: int  # the most made outside the blocks that was alive at a time behind the last block

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest


def measure(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    run: Callable[[Callable[..., Tensor]], Any],
    device: torch.device,
    numbers: Numbers,
) -> Footprint:
    """Count what one forward pass of `model` keeps. The model comes out as it went in, on meta or not.

    Args:
        model: everything that the pass calls.
        blocks: parts of it to count for themselves.
        run: makes the pass; it is given `torch.empty` for the tensors of its batch and returns what the caller of a
            real pass would hold until the backward pass.
        device: where the model will compute; decides which kernels are chosen.

    Raises:
        Exception: whatever the model raises where its forward pass depends on values (a dynamic choice of experts).
    """
    fake, kept = FakeTensorMode(), Kept(len(blocks))
    band.cache_clear()  # masks made with values and without do not mix
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=numbers.autocast)
    with faked(model, fake, device, numbers) as tensors, no_triton(), fake:
        kept.given.update(map(address, tensors))

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            tensor = torch.empty(*shape, dtype=dtype, device=device)
            kept.given.add(address(tensor))
            tensors.append(tensor)  # an address is not given out again while it lives
            return tensor

        for index, block in enumerate(blocks):
            block.forward = kept.inside(index, block.forward)
        with kept, autocast:
            answer = run(empty)
        footprint = kept.footprint()
        del answer
    return footprint


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Made(NamedTuple):
    storage: StorageWeakRef
    size: int
    block: int | None


class Kept(TorchDispatchMode):
    """Notes every storage that operators make and the block in which they make it."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.given: set[int] = set()  # addresses of what does not count
        self.made: dict[int, Made] = {}  # a weak reference keeps its address from being used again
        self.block: int | None = None
        self.num_left = 0  # calls of blocks that have ended
        self.outside: list[Made] = []  # made outside the blocks, dead ones taken out now and then
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        out = function(*arguments, **(named or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := address(tensor)) not in self.given and key not in self.made:
                storage = tensor.untyped_storage()
                self.made[key] = made = Made(StorageWeakRef(storage), storage.nbytes(), self.block)
                if self.block is None:
                    self.outside.append(made)
        if self.block is None and self.num_left >= self.num_blocks:
            self.outside = [made for made in self.outside if not made.storage.expired()]
            self.peak = max(self.peak, sum(made.size for made in self.outside))
        return out

    def inside(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of block `index`; a block inside a block counts with the outer one."""

        def noted(*arguments: Any, **named: Any) -> Any:
            outer = self.block
            self.block = index if outer is None else outer
            try:
                return forward(*arguments, **named)
            finally:
                self.block = outer
                self.num_left += 1

        return noted

    def footprint(self) -> Footprint:
        sizes: dict[int | None, int] = dict.fromkeys([None, *range(self.num_blocks)], 0)
        for made in self.made.values():
            if not made.storage.expired():
                sizes[made.block] += made.size
        rest = sizes.pop(None)
        return Footprint(tuple(sizes.values()), rest, max(rest, self.peak))


@contextlib.contextmanager
def faked(model: nn.Module, fake: FakeTensorMode, device: torch.device, numbers: Numbers) -> Iterator[list[Tensor]]:
    """Every parameter, buffer and plain tensor of `model` as a fake one on `device`; they are handed out.

    Behind it every module has the attributes that it had before, whatever its forward pass has put there.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    made: dict[int, Tensor] = {}  # by the original, so that ties stay

    def of(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in made:
            dtype = tensor.dtype
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                dtype = numbers.trained if tensor.requires_grad else numbers.frozen
            with fake:
                empty = torch.empty(tensor.shape, dtype=dtype, device=device)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    try:
        for module, attributes in before:
            vars(module).update({name: of(value) for name, value in attributes.items() if isinstance(value, Tensor)})
            for kind in ("_parameters", "_buffers"):
                vars(module)[kind] = {name: of(value) for name, value in attributes[kind].items()}
        yield list(made.values())
    finally:
        band.cache_clear()
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextlib.contextmanager
def no_triton() -> Iterator[None]:
    """Triton's kernels are not started: they write into tensors that are there already, and these have no memory."""
    if "triton" not in sys.modules:
        yield
        return
    from triton.runtime.jit import KernelInterface

    start = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *arguments, **named: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = start


@dataclass(frozen=True)
class Choice:
    """Which blocks are run again in the backward pass, and how much is then kept at the highest point."""

    blocks: tuple[int, ...]
    peak: int


def fewest(plain: Footprint, again: Footprint, budget: float) -> Choice | None:
    """The smallest set of blocks whose checkpointing keeps the pass within `budget` bytes; the lowest where several do.

    `plain`: nothing checkpointed; `again`: every block. None where even that is not enough. Two things have to fit:
    everything that is kept when the forward pass ends, and, when a checkpointed block is run again on the way back,
    what the blocks below it keep and all that it makes itself. So the lowest blocks are the best ones: when they are
    run again, the upper ones have been dropped.
    """
    saved = [max(0, one - other) for one, other in zip(plain.blocks, again.blocks, strict=True)]
    needed = plain.rest_peak + sum(plain.blocks) - budget  # by so much the end of the forward pass is too high
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] + [None] * len(saved)  # by number: most saved, by whom
    held: int = plain.rest  # up to this block, nothing checkpointed
    for index, size in enumerate(plain.blocks):
        held += size
        for number in range(index, -1, -1):
            so_far, more = best[number], best[number + 1]
            if so_far is None or held - so_far[0] > budget:
                continue
            if more is None or so_far[0] + saved[index] > more[0]:
                best[number + 1] = so_far[0] + saved[index], (*so_far[1], index)
    for choice in best:
        if choice is not None and choice[0] >= needed:
            return Choice(choice[1], peak(plain, again, choice[1]))
    return None


def peak(plain: Footprint, again: Footprint, chosen: Iterable[int]) -> int:
    """The most bytes kept at a time with the blocks `chosen` checkpointed."""
    chosen = set(chosen)
    highest, below = 0, plain.rest
    for index, (whole, part) in enumerate(zip(plain.blocks, again.blocks, strict=True)):
        if index in chosen:
            highest = max(highest, below + whole)
        below += min(whole, part) if index in chosen else whole
    return max(highest, below - plain.rest + plain.rest_peak)
