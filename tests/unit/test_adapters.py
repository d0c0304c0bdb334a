"""Fused LoRA layers: PEFT's numbers, the input kept once for siblings, nothing held longer than a parent's pass."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from distft.model import adapters
from distft.model.activation import enable
from distft.model.load import blocks
from distft.model.lora import AdaptedLinear
from distft.model.plain import quiet
from tests.unit import folders

BOUND = 1e-5
KINDS: dict[str, Callable[[], Any]] = {
    kind: folders.CONFIGS[kind]
    for kind in ("llama", "qwen3", "gemma3", "mistral", "gpt-neox", "deepseek v3, stored buffer")
}
KINDS["qwen2, biases"] = lambda: Qwen2Config(**folders.SHAPE)


def with_adapters(config: Any, precision: torch.dtype = torch.float32, **knobs: Any) -> Any:
    """A PEFT model with random weights everywhere, adapters in fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    knobs = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | knobs
    with quiet():
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **knobs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.2 if parameter.ndim == 1 else 0.0, 0.2)
            if "lora_" not in name:
                parameter.data = parameter.data.to(precision)
    return model.train()


def fused(plain: Any) -> Any:
    model = copy.deepcopy(plain)
    assert adapters.apply(model) == []
    return model


def outcome(model: Any, **options: Any) -> list[Tensor]:
    """Loss, logits and the gradient of every adapter."""
    model.zero_grad()
    answer = model(input_ids=folders.ids(), labels=folders.ids(), **options)
    answer.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [answer.loss.detach(), answer.logits.detach().float(), *gradients]


def apart(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(adapters.errors([each.detach() for each in got], [each.detach() for each in expected]))


def nodes(tensor: Tensor) -> int:
    """Fused nodes in the graph that made `tensor`."""
    seen: set[Any] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum(isinstance(node, AdaptedLinear._backward_cls) for node in seen)


# --- PEFT's numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_equal_to_peft(kind: str) -> None:
    plain = with_adapters(KINDS[kind]())
    model = fused(plain)
    assert apart(outcome(model), outcome(plain)) < BOUND
    logits = model(input_ids=folders.ids()).logits
    assert nodes(logits) > 0
    with torch.no_grad():
        assert apart([model.eval()(input_ids=folders.ids()).logits], [logits.detach()]) < BOUND


def test_siblings_make_one_node() -> None:
    model = fused(with_adapters(KINDS["llama"]()))
    assert nodes(model(input_ids=folders.ids()).logits) == 2 * 4  # qkv, o, gate and up, down in each of two blocks
    model = fused(with_adapters(KINDS["gpt-neox"]()))
    assert nodes(model(input_ids=folders.ids()).logits) == 2 * 4  # no two layers share their input


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["k_proj"], ["down_proj", "up_proj"]])
def test_some_siblings_only(target: list[str]) -> None:
    plain = with_adapters(KINDS["llama"](), target_modules=target, use_rslora=True)
    assert apart(outcome(fused(plain)), outcome(plain)) < BOUND


class Calls(TorchDispatchMode):
    """Counts calls of the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.distft.adapted_linear.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("mode", "passes"), [("none", 1), ("selective", 1), ("full", 2)])
def test_with_checkpointing(mode: str, passes: int) -> None:
    plain = with_adapters(KINDS["llama"]())
    model = fused(plain)
    enable(model, blocks(model), mode)
    with Calls() as calls:
        got = outcome(model)
    assert apart(got, outcome(plain)) < BOUND
    assert calls.count == passes * 2 * 4


def test_generation_with_a_cache() -> None:
    plain = with_adapters(KINDS["qwen3"]()).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    expected = plain.generate(input_ids=folders.ids(), **options)
    assert torch.equal(fused(plain).generate(input_ids=folders.ids(), **options), expected)


def test_adapters_switched_off_and_merged() -> None:
    plain = with_adapters(KINDS["llama"]())
    model = fused(plain)
    with plain.disable_adapter(), model.disable_adapter(), torch.no_grad():
        base = plain(input_ids=folders.ids()).logits
        assert torch.equal(model(input_ids=folders.ids()).logits, base)
    expected = plain(input_ids=folders.ids()).logits
    assert apart([base], [expected]) > 0.01
    model.merge_adapter()
    assert apart([model(input_ids=folders.ids()).logits], [expected]) < 10 * BOUND


def test_bf16_base_with_fp32_adapters() -> None:
    """As near to fp32 as PEFT's own bf16 is, with gradients in the adapters' own type."""
    exact = outcome(with_adapters(KINDS["llama"]()))
    plain = with_adapters(KINDS["llama"](), torch.bfloat16)
    model = fused(plain)
    with torch.autocast("cpu", torch.bfloat16):
        got, theirs = outcome(model), outcome(plain)
    assert [gradient.dtype for gradient in got] == [torch.float32] * len(got)
    norm = sum(float(each.norm()) ** 2 for each in exact[2:]) ** 0.5
    ours = sum(float((one - other).norm()) ** 2 for one, other in zip(got[2:], exact[2:], strict=True)) ** 0.5
    peft = sum(float((one - other).norm()) ** 2 for one, other in zip(theirs[2:], exact[2:], strict=True)) ** 0.5
    assert 0 < ours / norm < 1.5 * peft / norm < 0.2


class Copying(TorchDispatchMode):
    """Counts casts of single tensors to bf16, and rounds in which many are copied together."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = self.rounds = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and (options or {}).get("dtype") == torch.bfloat16:
            self.casts += 1
        self.rounds += function is torch.ops.aten._foreach_copy_.default
        return function(*arguments, **(options or {}))


def test_adapters_are_cast_together_and_only_after_a_change() -> None:
    model = fused(with_adapters(KINDS["llama"](), torch.bfloat16))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def counted() -> tuple[list[Tensor], int, int]:
        with Copying() as copying, torch.autocast("cpu", torch.bfloat16):
            found = outcome(model)
        return found, copying.casts, copying.rounds

    first, casts, rounds = counted()
    assert rounds == 1
    again, _, rounds = counted()
    assert rounds == 0
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    changed, later_casts, rounds = counted()
    assert (later_casts, rounds) == (casts, 1)
    assert apart(changed[:1], first[:1]) > 0.01
    fresh = fused(with_adapters(KINDS["llama"](), torch.bfloat16))
    fresh.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(outcome(fresh), changed, strict=True))
    assert casts < len(trained)  # hidden states and what belongs to no adapter


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_new_memory_is_written_before_it_is_read(precision: torch.dtype) -> None:
    """With every `empty` full of NaN, which deterministic mode sees to, nothing changes."""
    model = fused(with_adapters(KINDS["llama"](), precision))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        expected = outcome(model)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            got = outcome(model)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_adapters_may_not_change_before_the_backward_pass() -> None:
    model = fused(with_adapters(KINDS["llama"](), torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=folders.ids()).logits
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(1)
            model(input_ids=folders.ids())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


# --- what stays PEFT's, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_other_layers_keep_their_own_path(knobs: dict[str, Any]) -> None:
    config = KINDS["qwen2, biases"]()
    if "lora_bias" in knobs:
        knobs = knobs | {"target_modules": ["q_proj"]}
    plain = with_adapters(config, **knobs)
    model = fused(plain)
    assert not any("forward" in vars(module) for module in model.modules())
    torch.manual_seed(1)
    expected = outcome(plain)
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for one, other in zip(outcome(model), expected, strict=True))


def test_no_adapters_no_change() -> None:
    model = AutoModelForCausalLM.from_config(KINDS["llama"]())
    assert adapters.apply(model) == []
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_wrong_scaling_is_noticed_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check on the small copy: PEFT's path stays, and the note says so."""
    right = adapters.adapted_linear

    def wrong(*tensors: Any) -> Any:
        *others, scales, copies = tensors
        return right(*others, [scale * 1.001 for scale in scales], copies)

    monkeypatch.setattr(adapters, "adapted_linear", wrong)
    model = with_adapters(KINDS["llama"]())
    (note,) = adapters.apply(model)
    assert "do not compute what PEFT's do" in note
    assert not any("forward" in vars(module) for module in model.modules())


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept(layers: list[Any], x: Tensor, precision: torch.dtype) -> list[Tensor]:
    """The tensors, one a storage, that a pass of `layers` over `x` keeps for backward, parameters and the copies of
    adapters that are kept from pass to pass left out."""
    own = {parameter.untyped_storage().data_ptr() for layer in layers for parameter in layer.parameters()}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        outputs = [layer(x) for layer in layers]  # alive until everything is noted
    del outputs
    for layer in layers:
        if "forward" in vars(layer):
            low = layer.forward.args[0].low
            own |= {tensor.untyped_storage().data_ptr() for tensor in ([low.a, *low.b] if low else [])}
    return [tensor for address, tensor in found.items() if address not in own]


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
def test_the_input_is_kept_once(names: tuple[str, ...], precision: torch.dtype) -> None:
    plain = with_adapters(KINDS["llama"](), precision)
    x = torch.randn(2, 40, 32, dtype=precision, requires_grad=True)
    sizes = []
    for model in (fused(plain), plain):
        block = model.get_base_model().model.layers[0]
        parent = block.self_attn if "q_proj" in names else block.mlp
        tensors = kept([getattr(parent, name) for name in names], x, precision)
        sizes.append(bytes_of(tensors))
        if model is not plain:
            assert {tensor.dtype for tensor in tensors} == {precision}
    low = 2 * 40 * 3 * len(names) * x.element_size()
    assert sizes[0] == x.nbytes + low
    # PEFT alone keeps the same in fp32; under autocast a copy of x in fp32 and casts of it for every layer as well
    assert sizes[1] >= (sizes[0] if precision == torch.float32 else 2 * sizes[0])


def test_dropout_under_autocast_casts_no_activation() -> None:
    plain = with_adapters(KINDS["llama"](), torch.bfloat16, lora_dropout=0.1)
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16, requires_grad=True)
    wide = []
    for model in (fused(plain), plain):
        tensors = kept([model.get_base_model().model.layers[0].self_attn.q_proj], x, torch.bfloat16)
        wide.append(sum(tensor.dtype == torch.float32 and tensor.numel() >= x.numel() for tensor in tensors))
    assert wide[0] == 0
    assert wide[1] > 0


class Pair(nn.Module):
    """A parent of two layers that does not always feed both the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x: Tensor, way: str) -> tuple[Tensor, ...]:
        first = self.first(x)
        if way == "one":
            return (first,)
        if way == "interrupted":
            raise InterruptedError
        if way == "in place":
            with torch.no_grad():
                x.mul_(2)
        return first, self.second(x + 1 if way == "another" else x)


def pair() -> tuple[Any, Any, adapters.Group]:
    torch.manual_seed(0)
    plain: Any = get_peft_model(Pair(), LoraConfig(target_modules=["first", "second"], init_lora_weights=False))
    model = copy.deepcopy(plain)
    adapters.fuse(model, {adapters.kind_of(Pair()): [("first", "second")]})
    return plain, model, model.base_model.model.first.forward.args[0]


@pytest.mark.parametrize("way", ["both", "one", "another", "in place", "interrupted"])
def test_nothing_is_held_and_everything_right_whatever_siblings_do(way: str) -> None:
    plain, model, group = pair()
    assert len(group.members) == 2
    x = torch.randn(3, 6)
    results = []
    for either in (plain, model):
        own = x.clone()
        try:
            outputs = either(own, way)
        except InterruptedError:
            outputs = ()
        results.append(list(outputs))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*results, strict=True))
    assert group.input is None
    assert group.outputs == {}
    gone = weakref.ref(own)
    del own, outputs, either
    results.clear()
    assert gone() is None


def test_compiled_code_is_peft_s() -> None:
    """One graph, no break: torch.compile fuses what PEFT wrote."""
    plain, model, group = pair()
    x = torch.randn(3, 6)
    expected = plain(x, "both")
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    for one, other in zip(compiled(x, "both"), expected, strict=True):
        assert torch.equal(one, other)
        assert nodes(one) == 0
    assert nodes(model(x, "both")[0]) == 1
    assert group.outputs == {}


def test_shapes_alone() -> None:
    """On meta as well, where plans and estimates are made."""
    _, model, _ = pair()
    x = torch.randn(3, 6, device="meta", requires_grad=True)
    outputs = model.to("meta")(x, "both")
    assert [tuple(each.shape) for each in outputs] == [(3, 5), (3, 4)]
    sum(each.sum() for each in outputs).backward()
    assert x.grad.shape == x.shape


def test_an_output_nobody_used_has_no_gradient() -> None:
    plain, model, _ = pair()
    x = torch.randn(3, 6, requires_grad=True)
    gradients = []
    for either in (plain, model):
        x.grad = None
        either(x, "both")[1].square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in either.parameters() if parameter.requires_grad)])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-6)
