"""The head's arithmetic: every way gives the same in as many products as it must; the trial takes no wrong one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distft.errors import UserMistake
from distft.model import cross_entropy, head_trial
from distft.model.cross_entropy import WAYS
from distft.model.head_trial import Finding, Shape, choice, remembered, settle, trial
from distft.model.loss import HeadRequest, Tail, head_forward
from distft.world import World

CPU = torch.device("cpu")
POSITIONS, DIM, WORDS = 40, 16, 96
SHAPE = Shape(POSITIONS, DIM, WORDS, "float32", True, 8, False)


def head_and_hidden(trained: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(DIM, WORDS, bias=False)
    head.weight.requires_grad_(trained)
    return head, torch.randn(POSITIONS, DIM, requires_grad=True), torch.randint(WORDS, (POSITIONS,))


class Products(TorchDispatchMode):
    """Operations of matrix products, 2 m n k each."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = arguments[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert "mm" not in name, name
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("trained", "products"), [(True, 3), (False, 2)])
def test_a_trained_head_costs_three_products_and_a_frozen_one_two(trained: bool, products: int) -> None:
    head, hidden, targets = head_and_hidden(trained)
    one = 2 * POSITIONS * DIM * WORDS
    with Products() as forward:
        total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 8))
    assert forward.flops == products * one
    with Products() as backward:
        total.backward()
    assert backward.flops == 0  # everything was made in the forward pass
    with torch.no_grad(), Products() as evaluation:
        head_forward(head, hidden, HeadRequest(Tail(), targets, 8))
    assert evaluation.flops == one


def test_one_more_product_is_seen() -> None:
    """The plain way under checkpointing makes the logits twice: the fourth product of a trained head."""
    head, hidden, targets = head_and_hidden()
    with Products() as seen, torch.utils.checkpoint.set_checkpoint_early_stop(False):
        logits = torch.utils.checkpoint.checkpoint(head, hidden, use_reentrant=False)
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert seen.flops == 4 * 2 * POSITIONS * DIM * WORDS


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_torch_s_own_gives_the_same(by_position: bool, trained: bool) -> None:
    if not hasattr(nn.functional, "linear_cross_entropy"):
        pytest.skip("needs torch >= 2.13")
    results = []
    for way in ("chunked", "torch"):
        head, hidden, targets = head_and_hidden(trained)
        total, nll = head_forward(head, hidden, HeadRequest(Tail(), targets, 8, way, by_position))
        (0.5 * total).backward()
        results.append((total.detach(), nll if by_position else nll.sum(), hidden.grad, head.weight.grad))
    for ours, other in zip(*results, strict=True):
        assert (ours is None) == (other is None)
        if ours is not None:
            torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-6)


def test_a_confident_chunk_keeps_its_digits() -> None:
    """Logits of 1e3: probabilities under the smallest float have a loss all the same, and the largest is 1."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [3.0, 3.0, 3.0]])
    targets = torch.tensor([1, 2])
    expected = nn.functional.cross_entropy(logits.double(), targets, reduction="none").float()
    nll, gradient = cross_entropy.softmax_gradient(logits.clone(), targets, Tail(), True)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(gradient, logits.softmax(1) - nn.functional.one_hot(targets, 3))


def test_the_trial_times_what_is_right_and_says_why_not() -> None:
    found = trial(SHAPE, Tail(softcap=5.0), CPU, repeats=1)
    assert list(found) == list(WAYS)
    assert found["chunked"].milliseconds is not None
    assert found["torch"].milliseconds is None
    assert "caps" in found["torch"].why_not
    assert found["liger"].milliseconds is None  # needs Triton and its GPU


def test_the_trial_refuses_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(hidden: Tensor, weight: Tensor, bias: Any, request: Any, needs: Any, sums: Any) -> Any:
        nll, (for_hidden, for_weight, for_bias) = WAYS["chunked"](hidden, weight, bias, request, needs, sums)
        return nll, (for_hidden, for_weight * 1.05, for_bias)

    monkeypatch.setitem(WAYS, "liger", wrong)
    finding = trial(SHAPE, Tail(), CPU, repeats=1)["liger"]
    assert finding.milliseconds is None
    assert finding.why_not == "wrong: the gradient of weight is off by 5.0%"


def test_ours_unless_another_is_clearly_faster() -> None:
    near = {"chunked": Finding(10.0), "liger": Finding(9.9), "torch": Finding(None, "cannot")}
    assert choice(near, "auto") == "chunked"
    assert choice({**near, "liger": Finding(8.0)}, "auto") == "liger"
    assert choice(near, "liger") == "liger"
    assert choice(near, "torch") == "chunked"
    assert choice({}, "auto") == "chunked"


def test_findings_are_kept_so_that_a_run_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = remembered(tmp_path, SHAPE, Tail(), CPU)
    assert (tmp_path / "head_trials.json").exists()
    assert remembered(tmp_path, SHAPE, Tail(), CPU) == first
    monkeypatch.setattr(head_trial, "trial", lambda *_: {"chunked": Finding(1.0)})
    assert remembered(tmp_path, SHAPE, Tail(), CPU) == first
    assert remembered(tmp_path, SHAPE, Tail(softcap=2.0), CPU) == {"chunked": Finding(1.0)}


def test_a_cpu_takes_ours_and_refuses_the_others(tmp_path: Path) -> None:
    trainee = SimpleNamespace(
        model=SimpleNamespace(get_output_embeddings=lambda: nn.Linear(4, 8)), notes=(), head_way="chunked"
    )
    world = World(0, 1, 0, 0, 1, CPU)
    for wanted in ("auto", "chunked"):
        assert settle(trainee, wanted, world, "fp32", 16, False, tmp_path) == []
    with pytest.raises(UserMistake, match=r"model\.head=liger cannot be used: it needs a CUDA GPU"):
        settle(trainee, "liger", world, "fp32", 16, False, tmp_path)
    assert trainee.head_way == "chunked"
    assert not list(tmp_path.iterdir())
