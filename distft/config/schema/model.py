from __future__ import annotations

from dataclasses import dataclass, field

from distft.config.schema.knob import choice


@dataclass
class TinyShape:
    """The Llama that `model=tiny` builds with random weights, and the size of its byte-level BPE vocabulary."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    vocab_size: int = 4096


@dataclass
class Model:
    name: str = choice("tiny", "hf")
    """tiny: a small Llama with random weights, built here. hf: any Hugging Face causal language model."""

    path: str | None = None
    """Folder or hub id of the model (`model=hf`). A hub id is fetched once, before the workers start."""

    revision: str | None = None
    """Commit or tag of a hub id."""

    attention: str = choice("auto", "varlen", "sdpa", "eager")
    """auto: the varlen path where the model allows it, else a slower correct one, and says so."""

    kernels: str = choice("auto", "liger", "none")
    """RMSNorm, RoPE and SwiGLU in better ways than the model's own, where a small copy of the model proves them equal.
    liger: fused, from liger-kernel. auto: those on CUDA where installed, else RMSNorm and SwiGLU in plain torch that
    keep less for the backward pass. none: the model's own."""

    head: str = choice("auto", "chunked", "liger", "torch")
    """How the head's loss is computed. chunked: in plain torch. liger: with liger-kernel's kernel. torch: by its own
    linear_cross_entropy (torch >= 2.13). auto: chunked on a CPU, on CUDA the fastest in a short trial (kept in the
    cache)."""

    compile: bool = False
    """torch.compile of every transformer block, in training passes, in place of fused kernels: worth its minutes on a
    GPU; on a CPU it gains about 2 %. Needs a C++ compiler on a CPU, Triton on a GPU."""

    trust_remote_code: bool = False
    """Run Python that lies in the model's folder. Only for folders you have read."""

    tiny: TinyShape = field(default_factory=TinyShape)
