"""DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): zero1, zero2, zero3 and zero3_offload.

What is kept in how many bytes a value, N ranks: zero1 shards master and moments, zero2 the gradients as well, zero3 the
parameters as well; zero3_offload keeps parameters, master and moments in host memory. Full tuning in bf16 is
DeepSpeed's own bf16 mode (bf16 weights, fp32 master, fp32 accumulation and reduction). Adapters in a bf16 run are fp32
parameters beside a frozen bf16 base and computed under autocast, as the other engines do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # no guessing, no word about it
import deepspeed
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from distft.config.schema import Run
from distft.model.load import finish_buffers
from distft.objective.trainee import LossSums
from distft.strategy.base import Shard
from distft.strategy.birth import has_separate_experts, persistent_buffers
from distft.strategy.zero_partition import Partition, allocate, full_shape, keep_experts_together, own_range
from distft.strategy.zero_settings import STAGES, settings
from distft.strategy.zero_start import frugal, import_muon
from distft.world import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from distft.objective.trainee import LogitsRequest, LossRequest, Trainee
    from distft.strategy.base import MakeOptimizer
    from distft.weights.store import Weights

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """The engine behind `strategy=zero1|zero2|zero3|zero3_offload`; see distft/strategy/base.py for the contract."""

    trainee: Trainee
    writes_shards = True  # ranges of different ranks never overlap: every rank writes its own

    def __init__(self, run: Run, world: World, precision: str) -> None:
        self.run, self.world, self.precision = run, world, precision
        self.stage = STAGES[run.strategy.name]
        self._num_updates = 0
        self._num_dropped: Tensor | float = 0.0  # of these, dropped by a flag on the device
        silence()

    # --- birth -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def born(self) -> Iterator[None]:
        """On meta. `prepare` allocates tensor by tensor, and under zero3 keeps this rank's partition of each only."""
        with torch.device("meta"):
            yield

    def prepare(
        self, trainee: Trainee, blocks: list[nn.Module], weights: Weights, make_optimizer: MakeOptimizer
    ) -> None:
        """Lay the trainee over the ranks; each rank reads only the ranges of trained weights that it owns.

        `blocks` is not used: ZeRO-3 gathers module by module.
        """
        self.trainee = trainee
        model = trainee.model
        mixed = any(not parameter.requires_grad for parameter in model.parameters())
        self.autocast = self.precision == "bf16" and mixed
        if has_separate_experts(name for name, parameter in model.named_parameters() if parameter.requires_grad):
            keep_experts_together(model, self.stage)
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        config = settings(self.run, self.world, self.precision == "bf16" and not mixed, num_trained)
        self.saves_linear = bool(config["zero_optimization"].get("memory_efficient_linear", True)) and self.stage == 3

        os.environ["LOCAL_RANK"] = str(self.world.local_rank)  # DeepSpeed reads it, also in a world of one
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a CPU collective, compiled for minutes
        deepspeed.comm.init_distributed(auto_mpi_discovery=False)
        partition = Partition(config) if self.stage == 3 else None
        allocate(model, self.world.device, self._dtype_of, partition)
        finish_buffers(model, self.world.device)
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.shapes = {name: full_shape(parameter) for name, parameter in self.parameters.items()}
        self.trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

        optimizer = make_optimizer(list(self.trained.items()))
        import_muon()
        with contextlib.redirect_stdout(io.StringIO()), frugal():  # BF16_Optimizer prints memory reports
            self.engine, *_ = deepspeed.initialize(
                model=Envelope(trainee, self.world, self.autocast), optimizer=optimizer, config=config
            )
        self.optimizer: Optimizer = self.engine.basic_optimizer
        self._stream(weights)

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        if not parameter.is_floating_point():
            return parameter.dtype
        low = self.precision == "bf16" and not (self.autocast and parameter.requires_grad)
        return torch.bfloat16 if low else torch.float32

    @torch.no_grad()
    def _stream(self, weights: Weights) -> None:
        """Trained parameters: this rank's range into the fp32 master. Frozen ones: this rank's partition, or whole."""
        for shard in self._shards(with_moments=False):
            shard.tensor.copy_(weights.read(shard.name, shard.start, shard.tensor.numel()))
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                continue
            if self.stage == 3:
                start, length = own_range(parameter, self.world)
                if length > 0:
                    parameter.ds_tensor[:length].copy_(weights.read(name, start, length))
            else:
                parameter.view(-1).copy_(weights.read(name))
        for name, buffer in persistent_buffers(self.trainee.model):
            buffer.copy_(weights.read(name).view(buffer.shape))
        self.refresh()

    # --- one step ----------------------------------------------------------------------------------------------------

    def forward(self, request: LossRequest | LogitsRequest) -> LossSums | Tensor:
        with self._memory_efficient_linear():
            answer = self.engine(request)
        return LossSums(**answer) if isinstance(answer, dict) else answer

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate in fp32. DeepSpeed reduces by itself: zero1 within `step`, the others after every backward."""
        # The one place where DeepSpeed's averaging over the ranks is cancelled: the gradient wanted is the sum.
        with self._memory_efficient_linear():
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float, keep: bool | Tensor = True) -> Tensor:
        """See base.py. DeepSpeed drops the step on all ranks where the global norm is not finite (`overflow`)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # Read by the fused kernels of the optimizer inside: nothing of it goes through DeepSpeed.
        dropped = (~keep).float() if isinstance(keep, Tensor) else None
        self.optimizer.found_inf = dropped  # type: ignore[attr-defined]
        with muted(self.optimizer) if keep is False else contextlib.nullcontext():
            self.engine.step()
        self._tell_of_writing()
        if keep is not False and not self.engine.optimizer.overflow:
            self._num_updates += 1
            if dropped is not None:
                self._num_dropped = dropped + self._num_dropped
        norm = self.engine.optimizer._global_grad_norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)

    def _tell_of_writing(self) -> None:
        """DeepSpeed writes parameters past autograd, and adapters are cast anew only where somebody wrote."""
        torch.autograd.graph.increment_version(self.trained.values())

    @contextlib.contextmanager
    def _memory_efficient_linear(self) -> Iterator[None]:
        """Under ZeRO-3 a linear layer must not save a view of its weight: that would keep the gathered weight alive.

        DeepSpeed replaces `torch.nn.functional.linear` for the life of the process; here for one pass only.
        """
        if not self.saves_linear:
            yield
            return
        plain = nn.functional.linear
        nn.functional.linear = zero3_linear_wrap
        try:
            yield
        finally:
            nn.functional.linear = plain

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        return self._num_updates - int(self._num_dropped)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates, self._num_dropped = value, 0.0
        for _, flat, group in self._flats():
            if has_moments(group):
                create_moments(self.optimizer, flat, group)["step"].fill_(value)

    def shards(self) -> Iterator[Shard]:
        yield from self._shards(with_moments=True)

    def _shards(self, with_moments: bool) -> Iterator[Shard]:
        flats = {index: (flat, group) for index, flat, group in self._flats()}
        for name, parameter in self.trained.items():
            index, offset, start, length = self._place(parameter)
            if length <= 0:
                continue
            flat, group = flats[index]
            tensors = {"param": flat}
            if with_moments and has_moments(group):
                state = create_moments(self.optimizer, flat, group)
                tensors |= {kind: state[kind] for kind in MOMENTS}
            for kind, tensor in tensors.items():
                yield Shard(name, kind, self.shapes[name], start, tensor.detach().narrow(0, offset, length))

    def _flats(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """The fp32 tensors that the optimizer updates on this rank: (index, flat tensor, its parameter group)."""
        groups = self.optimizer.param_groups
        if self.stage == 3:
            zero = self.engine.optimizer
            for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield index, flat, groups[zero.sub_group_to_group_id[index]]
        else:
            for index, group in enumerate(groups):
                yield index, group["params"][0], group

    def _place(self, parameter: Any) -> tuple[int, int, int, int]:
        """Where this rank's range of a trained parameter lies.

        Returns: index of the flat tensor, offset in it, first flat index in the parameter, length (0: nothing here).
        """
        if self.stage == 3:
            zero = self.engine.optimizer
            index, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            return index, offset, *own_range(parameter, self.world)
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0, 0
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return mapping.param_group_index, high.start, low.start, low.numel

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the fp32 master into the weights that compute, on every rank."""
        zero = self.engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            self._tell_of_writing()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:  # small parameters that stay gathered between steps
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @torch.no_grad()
    def release(self) -> None:
        self.optimizer.state.clear()

    def gather(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        masters = {shard.name: shard for shard in self._shards(with_moments=False)}
        for name in self.trained if names is None else names:
            parameter, shape = self.parameters[name], self.shapes[name]
            if name in self.trained:
                shard = masters.get(name)
                pieces = [(shard.start, shard.tensor)] if shard else []
                yield name, self._assemble(shape, torch.float32, pieces)
            elif self.stage == 3:
                start, length = own_range(parameter, self.world)
                part = parameter.ds_tensor
                pieces = [(start, part[:length])] if length > 0 else []
                yield name, self._assemble(shape, part.dtype, pieces)
            else:
                yield name, parameter.detach().to("cpu", copy=True) if self.world.is_main else None

    def _assemble(self, shape: tuple[int, ...], dtype: torch.dtype, pieces: list[tuple[int, Tensor]]) -> Tensor | None:
        """Put the ranks' pieces together, bit for bit: bytes are summed, and each byte comes from one rank only."""
        full = torch.zeros(torch.Size(shape).numel(), dtype=dtype, device=self.world.device)
        for start, piece in pieces:
            full[start : start + piece.numel()].copy_(piece)
        if self.world.size > 1:
            dist.all_reduce(full.view(torch.uint8))
        return full.view(shape).cpu() if self.world.is_main else None


class Envelope(nn.Module):
    """What DeepSpeed wraps: answers as a dict, whose tensors DeepSpeed finds (a dataclass it does not look into)."""

    def __init__(self, trainee: Trainee, world: World, autocast: bool) -> None:
        super().__init__()
        self.trainee = trainee
        self.device_type, self.autocast = world.device.type, autocast

    def forward(self, request: LossRequest | LogitsRequest) -> dict[str, Tensor] | Tensor:
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.autocast):
            answer = self.trainee.forward(request)  # no call: ZeRO-3's hooks would warn of the dataclass
        return dict(vars(answer)) if isinstance(answer, LossSums) else answer


def silence() -> None:
    """The run's own lines should be read, not DeepSpeed's, nor torch's about the names DeepSpeed calls."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f".*{name}.* is deprecated", FutureWarning)


def has_moments(group: dict[str, Any]) -> bool:
    return "betas" in group


def create_moments(optimizer: Optimizer, flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """AdamW's state of one flat tensor, made as torch makes it in the first step if it is not there yet."""
    state: dict[str, Tensor] = optimizer.state[flat]
    if "step" not in state:
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat.detach())
    return state


@contextlib.contextmanager
def muted(optimizer: Optimizer) -> Iterator[None]:
    """DeepSpeed's step runs as always, but the optimizer inside changes nothing: the gradients are used up."""
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step
