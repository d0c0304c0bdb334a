"""Every way of the head's loss against plain cross-entropy in fp32, on the device that it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.model.cross_entropy import WAYS, softmax_gradient
from distft.model.head_trial import Shape, choice, trial
from distft.model.loss import HeadRequest, Tail, head_forward
from tests.gpu.places import EVERYWHERE, GPU

POSITIONS, DIM, WORDS = 300, 64, 1000


def pieces(device: str, dtype: torch.dtype, trained: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(DIM, WORDS, bias=False).to(device, dtype)
    head.weight.requires_grad_(trained)
    hidden = torch.randn(POSITIONS, DIM).to(device, dtype).requires_grad_()
    return head, hidden, torch.randint(WORDS, (POSITIONS,)).to(device)


def unavailable(way: str, device: str) -> str:
    if way == "torch" and not hasattr(F, "linear_cross_entropy"):
        return "needs torch >= 2.13"
    if way == "liger" and device == "cpu":
        return "needs Triton and a GPU"
    if way == "liger":
        pytest.importorskip("liger_kernel.ops.cross_entropy", reason="needs liger-kernel")
    return ""


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ways(way: str, trained: bool, softcap: float | None, device: str) -> None:
    """bf16 carries 8 bits: 1 % of the norm for gradients; fp32, on a CPU, 1e-5."""
    if reason := unavailable(way, device):
        pytest.skip(reason)
    if way == "torch" and softcap is not None:
        pytest.skip("caps no logits")
    dtype, bound = (torch.bfloat16, 1e-2) if device == "cuda" else (torch.float32, 1e-5)
    head, hidden, targets = pieces(device, dtype, trained)
    weight, states = (tensor.detach().float().requires_grad_() for tensor in (head.weight, hidden))
    logits = states @ weight.T
    wanted = F.cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), targets,
                             reduction="none")  # fmt: skip
    wanted.sum().backward()
    total, nll = head_forward(head, hidden, HeadRequest(Tail(softcap=softcap), targets, 128, way))
    total.backward()
    assert (nll - wanted).norm() <= bound * wanted.norm()
    assert (hidden.grad.float() - states.grad).norm() <= bound * states.grad.norm()
    if trained:
        assert (head.weight.grad.float() - weight.grad).norm() <= bound * weight.grad.norm()
    else:
        assert head.weight.grad is None


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("master", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [7, POSITIONS])
def test_the_heads_gradient_is_summed_in_fp32(chunk: int, master: torch.dtype, device: str) -> None:
    """Over chunks of bf16 factors: 1 % of the norm, and no worse where there are many of them."""
    head, hidden, targets = pieces(device, torch.bfloat16, trained=True)
    weight, states = (tensor.detach().float().requires_grad_() for tensor in (head.weight, hidden))
    F.cross_entropy(states @ weight.T, targets, reduction="sum").backward()
    head.to(master)
    with torch.autocast("cuda", torch.bfloat16, enabled=master == torch.float32):
        total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, chunk))
    total.backward()
    for got, want in ((hidden.grad, states.grad), (head.weight.grad, weight.grad)):
        assert got is not None
        assert want is not None
        assert (got.float() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_softmax_may_overwrite_its_input_on_a_cpu(device: str) -> None:
    """And gives the same bits: that is no promise of torch's."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(64, 1003, device=device)
    targets = torch.randint(1003, (64,), device=device)
    expected = torch.softmax(logits, dim=1).scatter_add_(1, targets[:, None], torch.full((64, 1), -1.0, device=device))
    _, gradient = softmax_gradient(logits.clone(), targets, Tail(), True)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("trained", [True, False])
def test_the_trial_on_a_gpu(trained: bool, device: str) -> None:
    found = trial(Shape(2048, 512, 32_000, "bfloat16", trained, 512, False), Tail(), torch.device(device))
    assert found["chunked"].milliseconds is not None
    assert not any(finding.why_not.startswith("wrong") for finding in found.values()), found
    assert choice(found, "auto") in WAYS
