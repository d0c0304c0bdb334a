"""What an engine wraps: model and objective together, so that its hooks see one forward pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distft.data.batch import Batch
from distft.model import lookup
from distft.model.cross_entropy import Room
from distft.model.head import Request, attach, check_head
from distft.model.loss import tail_of
from distft.model.varlen import packed_arguments

CHUNK = 512  # positions whose logits exist at a time, if nothing else is known
CPU_LOGITS, MOST_CPU_LOGITS = 1 << 23, 1 << 25  # that exist at a time: 32 MiB, with many words up to 128
CPU_CHUNK = 256  # positions: from here on larger products are no faster
GPU_CHUNK = 2048  # positions, where a chunk's logits in all their copies take at most GPU_SHARE of the memory
GPU_SHARE, BYTES_A_LOGIT = 1 / 32, 12  # bf16, its gradient, and fp32 before and after the softmax


@dataclass(frozen=True)
class LossRequest:
    """Ask for the loss of one micro-batch."""

    batch: Batch
    scale: float  # 1 / supervised tokens of the global batch: multiplies the summed loss
    share: float = 1.0  # this micro-batch's real tokens / those of the global batch: weighs the MoE auxiliary loss
    num_sources: int = 1


@dataclass(frozen=True)
class LogitsRequest:
    """Ask for full logits at a few positions (decoding, checks)."""

    input_ids: Tensor  # [rows, length]
    position_ids: Tensor  # [rows, length]
    attention_mask: Tensor | None  # [rows, length] bool; None: every position is real
    positions: Tensor  # [n] flat index, row * length + column
    packed: Batch | None = None  # a packed micro-batch with these ids: its documents do not see each other


@dataclass(frozen=True)
class LossSums:
    """Answer to a loss request."""

    loss: Tensor  # scalar fp32 with a gradient: scale * sum(NLL) + share * auxiliary loss
    nll: Tensor  # [num_sources] fp32, detached sums of NLL by source
    counts: Tensor  # [num_sources] fp32, supervised tokens by source
    auxiliary: Tensor  # scalar fp32, detached, already weighted by share; 0 without one


torch.utils._pytree.register_dataclass(LossSums)  # so that FSDP2 finds the loss in what a trainee returns


class Trainee(nn.Module):
    """Model and loss in one module.

    `model` keeps its names: a parameter of the trainee is called `model.<name in the Hugging Face or PEFT model>`.
    The head's own `forward` is replaced on this instance by the chunked loss (see distft.model.loss), because only a
    call of the head module fires the engines' gather hooks on its weight. A PEFT model is called through its own
    forward.
    """

    notes: tuple[str, ...]  # what the user should know about the way this model's loss is computed

    def __init__(self, model: nn.Module, vocab_chunk: int = CHUNK) -> None:
        """`vocab_chunk`: supervised positions whose logits exist at a time, at most; on a CPU fewer if there are many
        words. See `chunk_on`.

        Raises:
            UserMistake: adapters lie on the output head.
        """
        super().__init__()
        self.model = model
        self.vocab_chunk = vocab_chunk
        self.head_way = "chunked"  # see distft.model.cross_entropy
        self.adds_gradients = False  # see `add_gradients`
        self.room = Room()
        config: Any = model.config
        config.use_cache = False
        self.config = config
        complaint = head_complaint(model)
        causal = attach(model, None if complaint else tail_of(self.config))
        self.notes = ()
        if complaint:
            name = type(causal).__name__
            self.notes = (f"{name}: {complaint}; its logits come from its own forward, as exact but slower",)
        self.takes = frozenset(inspect.signature(causal.base_model.forward).parameters)

    def forward(self, request: LossRequest | LogitsRequest) -> LossSums | Tensor:
        """Sums of the loss, or for a LogitsRequest fp32 logits [n, vocabulary]."""
        if isinstance(request, LogitsRequest):
            asked = self.ask(request.positions, request.input_ids, None)
            inputs = self.inputs(request.input_ids, request.position_ids, request.attention_mask)
            if request.packed is not None:
                inputs |= self.boundaries(request.packed)
            answer = self.model(**inputs, request=asked)
            logits: Tensor = answer.result
            return logits
        return self.loss(request)

    def add_gradients(self) -> None:
        """From now on add the gradients of embeddings and head to `.grad` where they are made, the head's in the
        forward pass: for an engine that has nothing to reduce, and lets one backward pass follow each loss.
        """
        lookup.enable(self.model)
        self.adds_gradients = True

    def loss(self, request: LossRequest) -> LossSums:
        batch = request.batch
        inputs = self.inputs(batch.input_ids, batch.position_ids, batch.attention_mask) | self.boundaries(batch)
        asked = self.ask(batch.positions, batch.input_ids, batch.targets, by_position=request.num_sources > 1)
        if self.adds_gradients:
            asked = asked._replace(factor=request.scale)
        answer = self.model(**inputs, request=asked)
        total, nll = answer.result
        loss, auxiliary = total * request.scale, torch.zeros_like(total)
        if answer.auxiliary is not None:
            weighted = answer.auxiliary.float() * request.share
            loss, auxiliary = loss + weighted, weighted.detach()
        by_source, counts = sums_by_source(nll.detach(), batch.sources, request.num_sources)
        return LossSums(loss, by_source, counts, auxiliary.detach())

    def ask(self, positions: Tensor, input_ids: Tensor, targets: Tensor | None, by_position: bool = True) -> Request:
        num_rows, length = input_ids.shape
        if input_ids.device.type != "cpu":
            return Request(positions, length, num_rows, targets, self.vocab_chunk, self.head_way, by_position)
        chunk = min(self.vocab_chunk, cpu_chunk(self.config.get_text_config().vocab_size))
        return Request(
            positions, length, num_rows, targets, chunk, self.head_way, by_position, factor=None, room=self.room
        )

    def boundaries(self, batch: Batch) -> dict[str, Any]:
        """Arguments that keep the documents of a packed row apart; none where one document fills its row."""
        if batch.cu_seqlens is None or len(batch.lengths) == 1:
            return {}
        return packed_arguments(
            self.config, batch.position_ids, batch.cu_seqlens, batch.max_length, batch.lengths, self.dtype
        )

    def inputs(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Arguments of the model's forward; those it does not know (a Mamba has no positions) are left out."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if "position_ids" in self.takes:
            inputs["position_ids"] = position_ids
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        return inputs

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes: autocast's dtype if that is on, else its embeddings'."""
        # not `.weight`: ZeRO-3 would gather it on the ranks that ask, and those with one document do not ask
        weight: Tensor = next(self.model.get_input_embeddings().parameters())  # type: ignore[operator]
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def cpu_chunk(vocabulary: int) -> int:
    """Positions whose logits exist at a time on a CPU: as many as its products need to be fast, if memory allows.

    A multiple of 64, which the products are faster at (122 GFLOP/s for 65 rows, 139 for 64, 163 for 128, 180 for 256
    where [rows, 128] meets [128, 128000]).
    """
    chunk = max(CPU_LOGITS // vocabulary, min(CPU_CHUNK, MOST_CPU_LOGITS // vocabulary))
    return max(64, chunk - chunk % 64)


def chunk_on(device: torch.device, config: Any) -> int:
    """The `vocab_chunk` of a run on this device."""
    if device.type != "cuda":
        return CHUNK
    memory = torch.cuda.get_device_properties(device).total_memory
    return gpu_chunk(config.get_text_config().vocab_size, memory)


def gpu_chunk(vocabulary: int, memory: int) -> int:
    """Positions whose logits exist at a time on a GPU with so many bytes of memory: from CHUNK to GPU_CHUNK.

    Every chunk reads the head's weight, and with a trained head its gradient, once more.
    """
    chunk = GPU_CHUNK
    while chunk > CHUNK and chunk * vocabulary * BYTES_A_LOGIT > GPU_SHARE * memory:
        chunk //= 2
    return chunk


def sums_by_source(nll: Tensor, sources: Tensor, num_sources: int) -> tuple[Tensor, Tensor]:
    """Sums of NLL and numbers of supervised tokens by source, [num_sources] fp32 each; the same bits in every run."""
    if num_sources == 1:
        return nll.sum()[None], torch.full((1,), float(sources.numel()), device=nll.device)
    member = sources == torch.arange(num_sources, device=nll.device)[:, None]  # [num_sources, supervised]
    return torch.where(member, nll, 0.0).sum(dim=1), member.sum(dim=1).float()


_complaints: dict[str, str] = {}


def head_complaint(model: Any) -> str:
    """`check_head`, once for each configuration. Remote code that made this model is trusted to make its small copy."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    key = causal.config.to_json_string(use_diff=False)
    if key not in _complaints:
        _complaints[key] = check_head(causal.config, type(causal).__module__.startswith("transformers_modules"))
    return _complaints[key]
