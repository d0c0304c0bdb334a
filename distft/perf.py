"""What a step costs and how well the device is used: floating-point operations, peak rates, memory.

A multiply-add counts as two operations. Counted are matrix products only, and only those that training needs:

- a linear layer of m x n weights: 2mn forward a token, 2mn for the gradient of its input where something trained lies
  before it, 2mn for the gradient of its weight where the weight is trained. Full fine-tuning: 6mn; under LoRA a frozen
  layer: 4mn, and its two adapters 6 (m + n) lora_rank;
- of a mixture of experts, the share of the experts that a token visits;
- the head, the same way, but on supervised positions only, since no other logits are computed;
- attention: 4 x heads x head size forward for each (query, key) pair that the mask allows inside a document, twice
  that backward. Documents in one bin do not see each other, so pairs are counted by real document lengths.

Operations repeated by gradient checkpointing are not counted, as in PaLM's model FLOPs utilisation (Chowdhery et al.
2022, appendix B): a step that recomputes is slower and its utilisation lower.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distft.data.batch import Step

# Dense bf16 tensor-core rates with fp32 accumulation, operations a second, from the makers' data sheets (without
# sparsity). The first entry whose words all occur in the device's name counts, so that special cases stand first.
PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("GB300", 2500e12),
    ("B300", 2250e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("A6000", 154.8e12),
    ("A5000", 111.1e12),
    ("L40S", 362.05e12),
    ("L40", 181.05e12),
    ("L4", 121e12),
    ("6000 Ada", 364.2e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI355X", 2500e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 191.5e12),  # a device is one of its two dies
    ("MI210", 181e12),
)


# A slice of a GPU, or a variant of a model with another rate than the entry of its name.
SLOWER = {"MIG", "Laptop", "D", "Ti", "SUPER", "Max"}


def peak_flops(device: torch.device, precision: str = "bf16") -> float | None:
    """Operations a second that one device can do at most in dense matrix products; None where it is not known.

    None on a CPU, for a GPU that is not in the table and for fp32: no utilisation is reported then rather than a
    made-up one.
    """
    if device.type != "cuda" or precision != "bf16":
        return None
    import torch

    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The bf16 peak of a GPU by the name that its driver gives, such as `NVIDIA H100 80GB HBM3`."""
    words = set(name.replace("-", " ").split())
    if words & SLOWER:
        return None
    for model, rate in PEAK_BF16:
        if set(model.split()) <= words:
            return rate
    return None


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that this rank holds now and the most it ever held: of the GPU's memory, or of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return {
            "memory_bytes": torch.cuda.memory_allocated(device),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    import psutil

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    now = psutil.Process().memory_info().rss
    return {"memory_bytes": now, "memory_peak_bytes": max(now, peak)}


def give_back() -> None:
    """Collect garbage, then `trim`."""
    import gc

    gc.collect()
    trim()


def trim() -> None:
    """Let the C library return what was freed to the system, which it otherwise keeps."""
    import ctypes

    of_glibc = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if of_glibc is not None:
        of_glibc(0)


def attended_pairs(lengths: Iterable[int], window: int | None = None) -> int:
    """(query, key) pairs under a causal mask inside documents of these lengths; `window` keys at most each query."""
    pairs = 0
    for length in lengths:
        seen = length if window is None else min(length, window)
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    return pairs


@dataclass(frozen=True)
class Attention:
    """Layers with the same reach: `per_pair` operations of all of them together, forward and backward."""

    per_pair: float
    window: int | None  # keys that a query sees at most; None: all before it


@dataclass(frozen=True)
class Cost:
    """Operations of training, forward and backward, by what they grow with."""

    per_token: float  # matrix products in the blocks
    per_supervised: float  # the head
    attention: tuple[Attention, ...]

    def of_documents(self, lengths: Sequence[int], num_supervised: int) -> float:
        """Operations for documents of these lengths that hold `num_supervised` supervised tokens."""
        pairs = sum(kind.per_pair * attended_pairs(lengths, kind.window) for kind in self.attention)
        return self.per_token * sum(lengths) + self.per_supervised * num_supervised + pairs

    def of_step(self, step: Step) -> float:
        """Operations of one global batch.

        A rank knows the lengths of its own documents only: their pairs a token stand for those of the other ranks.
        Exact with one data rank.
        """
        lengths = [length for batch in step.micro_batches if batch.num_tokens for length in batch.lengths]
        own = sum(lengths)
        pairs = sum(kind.per_pair * attended_pairs(lengths, kind.window) for kind in self.attention)
        return (
            self.per_token * step.num_tokens
            + self.per_supervised * step.num_supervised
            + (pairs * step.num_tokens / own if own else 0.0)
        )


def cost_of(model: nn.Module, blocks: Sequence[nn.Module]) -> Cost:
    """Count the operations of a Hugging Face causal language model, also one that PEFT has wrapped.

    Call it once adapters are in place and `requires_grad` is settled. Only shapes are read, so the model may be on meta
    or partitioned by ZeRO-3. "Something trained lies before it" goes by the order of registration, so under LoRA the
    first block's key and value projections count a gradient of their input that they do not need; attention counts as
    passing gradients from the first block on that trains anything.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {id(weight) for weight in _embeddings(model)}
    not_in_blocks = embeddings | {id(weight) for weight in head.parameters()}
    block_of = {id(weight): index for index, block in enumerate(blocks) for weight in block.parameters()}
    first_trained = len(blocks)  # the first block that gradients pass through
    trained_before = False
    per_token = 0.0
    for weight in model.parameters():
        before, trained_before = trained_before, trained_before or weight.requires_grad
        if weight.requires_grad:
            first_trained = min(first_trained, 0 if id(weight) in embeddings else block_of.get(id(weight), len(blocks)))
        if id(weight) not in not_in_blocks:
            per_token += _products(weight, config) * (1 + before + weight.requires_grad)
    per_supervised = sum(
        _products(weight, config) * (1 + trained_before + weight.requires_grad) for weight in head.parameters()
    )
    return Cost(per_token, per_supervised, tuple(_attention(config, len(blocks), first_trained)))


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)


def _products(weight: nn.Parameter, config: Any) -> float:
    """Forward operations a token of one weight: 2 x its size if it is a matrix, a stack of experts by their share."""
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    if len(shape) < 2:
        return 0.0
    size = 2.0
    for length in shape:
        size *= length
    num_experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    if len(shape) == 3 and shape[0] == num_experts:
        visited = _first(config, "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk") or 1
        size *= visited / num_experts
    return size


def _attention(config: Any, num_blocks: int, first_trained: int) -> Iterator[Attention]:
    """One entry for each reach that the layers have."""
    heads = _first(config, "num_attention_heads")
    if not heads:
        return
    value_size = _first(config, "v_head_dim", "head_dim") or config.hidden_size // heads
    key_size = _first(config, "head_dim") or config.hidden_size // heads
    if _first(config, "qk_rope_head_dim"):  # multi-head latent attention (DeepSeek-V2)
        key_size = config.qk_nope_head_dim + config.qk_rope_head_dim
    forward = 2.0 * heads * (key_size + value_size)
    per_pair: dict[int | None, float] = {}
    for index, window in enumerate(_windows(config, num_blocks)):
        if window != 0:
            per_pair[window] = per_pair.get(window, 0.0) + forward * (3 if index >= first_trained else 1)
    for window, flops in per_pair.items():
        yield Attention(flops, window)


def _windows(config: Any, num_blocks: int) -> list[int | None]:
    """Keys that a query of each block sees at most; None: all before it; 0: the block has no attention."""
    sliding = _first(config, "sliding_window") if getattr(config, "use_sliding_window", True) is not False else None
    reach = {
        "full_attention": None,
        "attention": None,
        "sliding_attention": sliding,
        "chunked_attention": _first(config, "attention_chunk_size"),
    }
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [sliding] * num_blocks
    return [reach.get(kind, 0) for kind in kinds[:num_blocks]]


def _first(config: Any, *names: str) -> Any:
    """The first of these settings that the configuration has and that is set."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
