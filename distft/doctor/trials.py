"""Attention, optimizer and compiler, each tried forward and backward on this rank's device.

A kernel that is built for another torch or another GPU may end its process. So this module runs as a program
(`distft.doctor.kernels` starts it), which tells on standard output which trial it begins and what came of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from distft.doctor.bounded import why
from distft.doctor.verdict import FAILS, OK, SKIPPED, WARN, Verdict

if TYPE_CHECKING:
    from torch import Tensor

MARK = "distft-trial "  # stands before what this program has to say; libraries talk on standard output too
TOLERANCE = {"float32": 2e-4, "bfloat16": 4e-2}  # of the largest value

CURES = {
    "flash-attn": "Install it for this torch and GPU, or leave it out: PyTorch's own FlashAttention serves.",
    "liger-kernel": "model.kernels=none does without it.",
    "torch.compile": "Install g++ (on a GPU: triton), or leave model.compile at false.",
    "deepspeed": "pip install -c constraints.txt -e . , or train with strategy=fsdp or ddp.",
}
ALWAYS = ("matrix products", "sdpa", "varlen", "AdamW")  # what every run computes with


def ended(name: str, said: str, needed: Sequence[str]) -> Verdict:
    """Of a trial that did not go well."""
    if name in needed:
        return Verdict(name, FAILS, said, CURES.get(name, "Install torch anew for this machine."))
    return Verdict(name, WARN, said, CURES.get(name, "A run does without it."))


def main(arguments: Sequence[str]) -> int:
    names, needed = json.loads(arguments[0])
    for name in names:
        tell({"begins": name})
        verdict = tried(name, needed)
        tell({"name": name, "verdict": {key: getattr(verdict, key) for key in ("what", "state", "said", "cure")}})
    return 0


def tell(what: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(what)}", flush=True)


class Absent(Exception):
    """What a trial needs is not there, and need not be."""


def tried(name: str, needed: Sequence[str]) -> Verdict:
    try:
        return Verdict(name, OK, TRIALS[name]())
    except Absent as reason:
        return ended(name, str(reason), needed) if name in needed else Verdict(name, SKIPPED, str(reason))
    except Exception as error:
        return ended(name, why(error), needed)


def device() -> Any:
    from distft.world import device_for

    return device_for(int(os.environ.get("LOCAL_RANK", 0)))


def product() -> str:
    import torch

    names = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.full((64, 64), 2.0, device=device(), dtype=dtype, requires_grad=True)
        (a @ a).sum().backward()
        assert a.grad is not None
        if not bool((a.grad == 256).all()):
            raise ValueError(f"the gradient of a product of twos is wrong in {dtype}")
        names.append(str(dtype).removeprefix("torch."))
    return f"right in {' and '.join(names)} on {device().type}"


def inputs(dtype: Any, heads: int = 2, size: int = 64) -> list[Tensor]:
    """Query, key and value of two documents in one row: [1, heads, 48, size]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1, heads, 48, size, generator=generator) for _ in range(3)]
    return [value.to(device(), dtype).requires_grad_() for value in values]


LENGTHS = (32, 16)  # of the two documents


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention inside the documents, written out in fp32: [1, heads, length, size]."""
    import torch

    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(query.device)
    same = numbers[:, None] == numbers[None, :]
    mask = same & torch.ones_like(same).tril()
    scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.float()


def agrees(attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: Any) -> None:
    """
    Raises:
        ValueError: output or a gradient is not that of attention written out.
    """
    import torch

    got, wanted = inputs(dtype), inputs(dtype)
    outputs = [attend(*got).float(), by_hand(*wanted)]
    for output in outputs:
        output.square().sum().backward()
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    gradients: list[Any] = [(a.grad, b.grad) for a, b in zip(got, wanted, strict=True)]
    pairs = zip(
        ("output", "query", "key", "value"), [tuple(output.detach() for output in outputs), *gradients], strict=True
    )
    for name, (one, other) in pairs:
        apart = float((one.float() - other.float()).abs().max() / other.float().abs().max())
        if not apart <= bound:
            kind = "output" if name == "output" else f"gradient of the {name}"
            raise ValueError(f"{kind} is {apart:.2g} of its size away from attention written out ({dtype})")
    if device().type == "cuda":
        torch.cuda.synchronize()


def half() -> Any:
    import torch

    return torch.bfloat16 if device().type == "cuda" else torch.float32


def each_document(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    import torch
    import torch.nn.functional as F

    parts = zip(*(tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts], dim=2)


def sdpa() -> str:
    """PyTorch's attention, each of its backends."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    agrees(each_document, torch.float32)
    run, refused = [], []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                agrees(each_document, half())
            run.append(name.split("_")[0].lower())
        except RuntimeError:
            refused.append(name.split("_")[0].lower())
    return f"{', '.join(run)} run" + (f"; {', '.join(refused)} not on this device" if refused else "")


def tokens_first(kernel: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel over [tokens, heads, size] as attention over [1, heads, tokens, size]."""
    import torch

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=query.device)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return kernel(q, k, v, bounds, max(LENGTHS), None, None).transpose(0, 1)[None]

    return attend


def varlen() -> str:
    """The attention that distft registers with transformers."""
    import torch
    from torch import nn

    from distft.model.varlen import kernel_for, varlen_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=query.device)
        named: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}
        return varlen_attention(nn.Module(), query, key, value, None, document_lengths=LENGTHS, **named)[0].transpose(
            1, 2
        )

    agrees(attend, half())
    query, _, value = inputs(half())
    fused = device().type == "cuda" and kernel_for(query, value, 0.0) is not None
    return "documents of one row keep apart; " + ("one fused kernel a row" if fused else "one call of sdpa a document")


def flash_attn() -> str:
    import torch

    from distft.model.varlen import flash_attention

    if find_spec("flash_attn") is None:
        raise Absent("not installed (pip install 'distft[flash]')")
    if device().type != "cuda":
        raise Absent("installed, but there is no GPU")
    agrees(tokens_first(flash_attention), torch.bfloat16)
    from importlib.metadata import version

    return f"version {version('flash-attn')}"


def torch_varlen() -> str:
    import torch

    from distft.model.varlen import has_torch_varlen
    from distft.model.varlen import torch_varlen as kernel

    if device().type != "cuda":
        raise Absent("FlashAttention inside PyTorch needs a GPU")
    if not has_torch_varlen():
        raise Absent("this torch was built without it")
    agrees(tokens_first(kernel), torch.bfloat16)
    return "FlashAttention inside PyTorch"


def flex() -> str:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device().type != "cuda":
        raise Absent("PyTorch has no backward pass of it on a CPU")
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(device())

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (numbers[q] == numbers[k])

    mask = create_block_mask(inside, None, None, sum(LENGTHS), sum(LENGTHS), device=str(device()))
    compiled = torch.compile(flex_attention)
    agrees(lambda query, key, value: compiled(query, key, value, block_mask=mask), torch.bfloat16)
    return "compiled; distft has no use for it"


def liger() -> str:
    from transformers import LlamaConfig

    from distft.model.kernels import fused_kinds, proven, why_not
    from distft.model.miniature import miniature

    if missing := why_not(device()):
        raise Absent(missing.rstrip("."))
    small = miniature(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2))
    assert small is not None
    taken = proven(small, device(), fused_kinds(may_be_torchs=False))
    if not taken:
        raise ValueError("no fused layer computes what the plain one does")
    return ", ".join(taken)


def adamw() -> str:
    """The fused optimizer that every run steps with, against the plain one."""
    import torch

    weights = [torch.ones(64, 64, device=device(), requires_grad=True) for _ in range(2)]
    for weight, fused in zip(weights, (True, False), strict=True):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused, foreach=False)
        for step in range(3):
            weight.grad = torch.full_like(weight, 0.5 + step)
            optimizer.step()
    apart = float((weights[0] - weights[1]).detach().abs().max())
    if not apart <= 1e-5:
        raise ValueError(f"weights are {apart:.2g} away from the plain optimizer's")
    return "fused, as the plain one"


def compiler() -> str:
    import torch

    from distft.model.compile import why_not

    if missing := why_not(device()):
        raise Absent(missing.rstrip("."))

    def function(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    x, y = (torch.linspace(0, 1, 100, device=device()).requires_grad_() for _ in range(2))
    torch.compile(function)(x).backward()
    function(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    if not torch.allclose(x.grad, y.grad, atol=1e-5):
        raise ValueError("the gradient of compiled code is wrong")
    return "compiles, forward and backward"


def deepspeed() -> str:
    """DeepSpeed imports; which of its own operators are built, and what that means."""
    import deepspeed.git_version_info

    built = [name for name, there in deepspeed.git_version_info.installed_ops.items() if there]
    if built:
        return f"its operators {', '.join(sorted(built))} are built"
    return "none of its operators is built nor needed: distft steps with torch's AdamW and has nothing compiled"


TRIALS: dict[str, Callable[[], str]] = {
    "matrix products": product,
    "sdpa": sdpa,
    "varlen": varlen,
    "flash-attn": flash_attn,
    "torch varlen": torch_varlen,
    "flex attention": flex,
    "liger-kernel": liger,
    "AdamW": adamw,
    "torch.compile": compiler,
    "deepspeed": deepspeed,
}
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
