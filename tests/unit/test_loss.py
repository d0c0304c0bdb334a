"""The chunked head against plain cross-entropy: values, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, MixtralConfig

from distft.errors import UserMistake
from distft.model.cross_entropy import Room
from distft.model.head import attach, check_head
from distft.model.loss import HeadRequest, Tail, head_forward, tail_of

TAILS = [Tail(), Tail(scale=0.25), Tail(softcap=2.0), Tail(scale=3.0, softcap=5.0)]


def plain(tail: Tail, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias) * tail.scale
    if tail.softcap is not None:
        logits = tail.softcap * torch.tanh(logits / tail.softcap)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def pieces(dtype: torch.dtype = torch.float32, num: int = 37, dim: int = 24, words: int = 50) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((num, dim), (words, dim), (words,))
    return [*(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes), torch.randint(words, (num,))]


def head_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().clone())
    return head


@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 512])
def test_equals_plain_cross_entropy(tail: Tail, with_bias: bool, chunk: int) -> None:
    hidden, weight, bias, targets = pieces()
    expected = plain(tail, hidden, weight, bias if with_bias else None, targets)
    (expected.sum() * 0.3).backward()
    wanted = [hidden.grad, weight.grad, bias.grad]

    head = head_of(weight, bias if with_bias else None)
    copy = hidden.detach().clone().requires_grad_()
    total, nll = head_forward(head, copy, HeadRequest(tail, targets, chunk))
    (total * 0.3).backward()
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=0)
    gradients = [copy.grad, head.weight.grad, head.bias.grad if with_bias else None]
    for name, got, want in zip(("hidden", "weight", "bias"), gradients, wanted, strict=True):
        if got is not None:
            assert (got - want).norm() <= 1e-6 * want.norm(), name


@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_gradients_added_in_the_forward_pass(tail: Tail, with_bias: bool, trained: bool) -> None:
    """Two passes with a factor leave the same sums as two passes whose gradients autograd is handed."""
    hidden, weight, bias, targets = pieces()
    heads, gradients = [head_of(weight, bias if with_bias else None).requires_grad_(trained) for _ in range(2)], []
    for head, factor in zip(heads, (None, 0.3), strict=True):
        passes = [part.detach().clone().requires_grad_() for part in (hidden[:20], hidden[20:])]
        for copy, part in zip(passes, (targets[:20], targets[20:]), strict=True):
            total, _ = head_forward(head, copy, HeadRequest(tail, part, 8, factor=factor, room=Room()))
            (total * 0.3).backward()
        gradients.append([*(copy.grad for copy in passes), head.weight.grad, head.bias.grad if with_bias else None])
    for expected, got in zip(*gradients, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert (got - expected).norm() <= 1e-6 * expected.norm()
    assert (heads[1].weight.grad is not None) == trained


def test_a_head_that_adds_makes_no_second_gradient() -> None:
    """Of the head's size nothing is made but its `.grad`, and that once."""
    hidden, weight, _, targets = pieces(num=8, dim=64, words=512)
    head = head_of(weight, None)
    sizes = []
    for _ in range(2):
        with Made() as made:
            total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 2, factor=1.0))
            total.backward()
        sizes.append(made.numels.count(64 * 512))
    assert sizes == [1, 0]
    with Made() as made:
        head_forward(head, hidden, HeadRequest(Tail(), targets, 2))[0].backward()
    assert made.numels.count(64 * 512) == 1  # the plain way is seen to make one


def test_logits_of_every_pass_take_the_same_memory() -> None:
    hidden, weight, _, targets = pieces(num=9, words=300)
    head, room = head_of(weight, None), Room()
    results, places = [], set()
    for given in (room, room, None):
        copy = hidden.detach().clone().requires_grad_()
        total, nll = head_forward(head, copy, HeadRequest(Tail(), targets, 4, room=given))
        total.backward()
        results.append((nll, copy.grad))
        places.add(room.memory.data_ptr())
    assert len(places) == 1
    assert room.memory.numel() == 4 * 300
    for nll, gradient in results[1:]:
        assert torch.equal(nll, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert room.take(2, 10, torch.bfloat16).dtype == torch.bfloat16


def test_low_precision_stays_near() -> None:
    """bf16 carries 8 bits: 1% of the norm is the bound for gradients, 0.5% for the loss."""
    hidden, weight, bias, targets = pieces(torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = plain(Tail(), *exact, targets).sum()
    expected.backward()
    head = head_of(weight, bias)
    copy = hidden.detach().clone().requires_grad_()
    total, _ = head_forward(head, copy, HeadRequest(Tail(), targets, 8))
    total.backward()
    assert total.dtype == torch.float32
    assert abs(total - expected) <= 5e-3 * expected
    for got, want in ((copy.grad, exact[0].grad), (head.weight.grad, exact[1].grad), (head.bias.grad, exact[2].grad)):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= 1e-2 * want.norm()


def test_autocast_keeps_the_master_gradient_in_fp32() -> None:
    hidden, weight, _, targets = pieces()
    head = head_of(weight, None)
    copy = hidden.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = head_forward(head, copy, HeadRequest(Tail(), targets, 16))
    total.backward()
    rounded = [tensor.detach().bfloat16().float().requires_grad_() for tensor in (hidden, weight)]
    plain(Tail(), *rounded, None, targets).sum().backward()
    for got, want in ((copy.grad, rounded[0].grad), (head.weight.grad, rounded[1].grad)):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-2 * want.norm()
    assert not torch.equal(head.weight.grad, head.weight.grad.bfloat16().float())


class Largest(TorchDispatchMode):
    """Remembers the most elements that one operation put out."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class Made(TorchDispatchMode):
    """The size of every tensor that was newly made."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if function in (torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default, torch.ops.aten.clone.default):
            self.numels.append(result.numel())
        return result


def test_full_logits_never_exist() -> None:
    hidden, weight, _, targets = pieces(num=600, dim=8, words=300)
    head = head_of(weight, None)
    with Largest() as seen:
        total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 32))
        total.backward()
    assert seen.numel < 32 * 300 + 1
    with Largest() as seen:
        plain(Tail(), hidden, weight, None, targets).sum().backward()
    assert seen.numel == 600 * 300  # the plain way is seen to make them


def test_frozen_head_makes_no_weight_gradient() -> None:
    hidden, weight, _, targets = pieces(num=8, dim=64, words=512)
    head = head_of(weight, None).requires_grad_(False)
    with Largest() as seen:
        total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 2))
        total.backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert seen.numel == 64 * 512  # a view of the weight; a gradient would be a second tensor of this size
    head.requires_grad_(True)
    hidden.grad = None
    total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 2))
    assert isinstance(total.grad_fn.gradients[1], Tensor)
    head.requires_grad_(False)
    total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 2))
    assert total.grad_fn.gradients[1] is None


def test_no_gradient_is_made_without_need() -> None:
    hidden, weight, _, targets = pieces()
    with torch.no_grad():
        total, nll = head_forward(head_of(weight, None), hidden, HeadRequest(Tail(), targets, 8))
    assert total.grad_fn is None
    assert not nll.requires_grad


def test_gradients_are_used_once() -> None:
    hidden, weight, _, targets = pieces()
    total, _ = head_forward(head_of(weight, None), hidden, HeadRequest(Tail(), targets, 8))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        total.backward()


def test_no_positions() -> None:
    hidden, weight, bias, targets = pieces()
    head, copy = head_of(weight, bias), hidden.detach().clone().requires_grad_()
    total, nll = head_forward(head, copy[:0], HeadRequest(Tail(), targets[:0], 8))
    total.backward()
    assert total == 0
    assert nll.shape == (0,)
    for gradient in (copy.grad, head.weight.grad, head.bias.grad):
        assert gradient is not None
        assert not gradient.any()


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_poisons_every_gradient(wrong: float) -> None:
    hidden, weight, _, targets = pieces()
    head = head_of(weight, None)
    with torch.no_grad():
        hidden[3, 0] = wrong
    total, _ = head_forward(head, hidden, HeadRequest(Tail(), targets, 8))
    total.backward()
    assert not total.isfinite()
    assert hidden.grad.isnan().all()
    assert head.weight.grad.isnan().all()


def test_only_the_loss_being_infinite_is_enough() -> None:
    """A target with probability zero: the softmax's own gradient would be finite."""
    hidden, weight = torch.zeros(2, 1, requires_grad=True), torch.tensor([[0.0], [0.0]])
    bias = nn.Parameter(torch.tensor([0.0, float("-inf")]))
    head = head_of(weight, bias)
    total, _ = head_forward(head, hidden, HeadRequest(Tail(), torch.tensor([0, 1]), 8))
    total.backward()
    assert total.isinf()
    assert head.weight.grad.isnan().all()
    head = head_of(weight, bias)
    head_forward(head, hidden.detach(), HeadRequest(Tail(), torch.tensor([0, 1]), 8, factor=0.5))
    assert head.weight.grad.norm().isnan()  # where it is added at once too: enough for the norm of all gradients


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "mixtral": MixtralConfig(**SIZES, output_router_logits=True, router_aux_loss_coef=0.1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_of_real_models_pass_the_check(name: str) -> None:
    assert check_head(CONFIGS[name]) == ""


@pytest.mark.parametrize(("name", "attribute"), [("gemma2", "softcap"), ("cohere", "scale"), ("granite", "scale")])
def test_the_check_sees_what_is_missed(name: str, attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missed = Tail(**{**vars(tail_of(CONFIGS[name])), attribute: getattr(Tail(), attribute)})
    monkeypatch.setattr("distft.model.head.tail_of", lambda config: missed)
    assert check_head(CONFIGS[name]) == "it does more to its logits than scale and softcap them"


def test_an_attached_model_still_behaves() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attach(model, tail_of(model.config))
        assert torch.equal(model(input_ids=ids).logits, before)
    assert [name for name, _ in model.named_modules()][-1] == "lm_head"


def test_adapters_on_the_head_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    peft_model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(UserMistake, match=r"tuning\.target"):
        attach(peft_model, Tail())
