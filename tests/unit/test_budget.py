"""What a pass keeps is known before there are weights, and a budget checkpoints the fewest blocks that fit."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from distft.config.schema import Run
from distft.data.batch import Batch
from distft.errors import UserMistake
from distft.model import adapters
from distft.model.activation import enable
from distft.model.footprint import Footprint, fewest, peak
from distft.objective.budget import GIB, Numbers, Shape, choose, footprint
from distft.objective.trainee import LossRequest, Trainee

NUMBERS = Numbers(torch.float32, torch.float32, autocast=False)
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES | {"head_dim": 16, "sliding_window": 32, "sliding_window_pattern": 2}),
}
LENGTHS = (100, 7, 93, 56)


def trainee(model_name: str, lora: str | None, device: str) -> tuple[Trainee, list[Any]]:
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(MODELS[model_name], attn_implementation="varlen")
        layers = list(model.model.layers)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(target_modules=lora, r=4))
    assert adapters.apply(model) == []
    return Trainee(model).train(), layers


def packed() -> Batch:
    """Several documents in a row, every token but the first of each supervised."""
    total = sum(LENGTHS)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.tensor([place for place in range(total) if place + 1 not in starts])
    return Batch(
        input_ids=torch.arange(total)[None] % 500,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        attention_mask=None,
        cu_seqlens=starts.to(torch.int32),
        max_length=max(LENGTHS),
        positions=positions,
        targets=positions % 500,
        sources=torch.zeros_like(positions),
        num_tokens=total,
        lengths=LENGTHS,
    )


def really_kept(module: Trainee, batch: Batch) -> int:
    """Bytes that the allocator gave out and did not get back while a real forward pass ran, not the first one."""
    with torch.no_grad():
        module(LossRequest(batch, scale=1.0))  # takes the memory of logits, which stays from pass to pass
    gc.collect()
    gc.disable()  # what earlier tests left behind is not given back in between
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            answer = module(LossRequest(batch, scale=1.0))
    finally:
        gc.enable()
    del answer
    return sum(event.self_cpu_memory_usage for event in watched.key_averages())


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("name", "lora"),
    [("llama", None), ("llama", "all-linear"), ("llama", r".*layers\.2\..*_proj"), ("gemma3", None)],
)
def test_what_is_kept_is_known_without_weights(name: str, mode: str, lora: str | None) -> None:
    module, layers = trainee(name, lora, "meta")
    counted = footprint(module, layers, mode, Shape(1, sum(LENGTHS), packed=True), CPU, NUMBERS)
    real, real_layers = trainee(name, lora, "cpu")
    enable(real.model, real_layers, mode)
    assert counted.total == pytest.approx(really_kept(real, packed()), rel=0.05)
    if lora and "2" in lora:
        assert counted.blocks[0] < counted.blocks[2] / 5  # frozen and below every adapter: hardly anything is kept


def test_counting_leaves_the_model_as_it_was() -> None:
    module, layers = trainee("gemma3", "all-linear", "meta")
    before = [dict(vars(part)) for part in module.modules()]
    footprint(module, layers, "full", Shape(1, 64, packed=True), CPU, NUMBERS)
    assert all(dict(vars(part)) == old for part, old in zip(module.modules(), before, strict=True))
    real, _ = trainee("gemma3", None, "cpu")  # no mask without values is left in a cache
    assert bool(real(LossRequest(packed(), scale=1.0)).loss.isfinite())


def test_the_larger_micro_batch_keeps_more_and_a_trained_head_its_gradient() -> None:
    """Negative control of the counts, and what the head adds."""
    module, layers = trainee("llama", None, "meta")
    few, many = (footprint(module, layers, "none", Shape(1, size, packed=True), CPU, NUMBERS) for size in (128, 256))
    assert many.blocks[1] == pytest.approx(2 * few.blocks[1], rel=0.01)
    adapted, its_layers = trainee("llama", "all-linear", "meta")
    frozen = footprint(adapted, its_layers, "none", Shape(1, 256, packed=True), CPU, NUMBERS)
    assert many.rest - frozen.rest >= 512 * 64 * 4


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_fewest_of_all_subsets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    whole = tuple(draw(5, 40) for _ in range(6))
    plain = Footprint(whole, rest=5, rest_peak=12)
    again = Footprint(tuple(draw(1, size) for size in whole), rest=5, rest_peak=12)
    subsets = [chosen for number in range(7) for chosen in itertools.combinations(range(6), number)]
    everything = peak(plain, again, range(6))
    assert everything == min(peak(plain, again, chosen) for chosen in subsets)
    assert fewest(plain, again, everything - 1) is None
    for budget in range(everything, peak(plain, again, ()) + 1, 3):
        choice = fewest(plain, again, budget)
        fitting = [chosen for chosen in subsets if peak(plain, again, chosen) <= budget]
        assert choice is not None
        assert choice.blocks in fitting
        assert choice.peak == peak(plain, again, choice.blocks)
        assert len(choice.blocks) == len(fitting[0])


class OneBin:
    """The part of a plan that tells the largest micro-batch."""

    packed, data_size, sequence_length, sources = True, 1, sum(LENGTHS), ()
    batch = Run().batch


def chosen(budget: float | None, mode: str = "none") -> tuple[Trainee, list[Any], Any]:
    module, layers = trainee("llama", None, "meta")
    run = Run()
    run.activation.budget, run.activation.mode = budget, mode
    plan: Any = OneBin
    return module, layers, choose(module, layers, run, plan, CPU, NUMBERS)


def test_a_budget_takes_the_mildest_way_that_fits() -> None:
    module, layers, unlimited = chosen(1.0)
    assert unlimited.blocks == []
    assert "No block is checkpointed" in unlimited.notes[0]
    shape = Shape(1, sum(LENGTHS), packed=True)
    counts = {mode: footprint(module, layers, mode, shape, CPU, NUMBERS) for mode in ("none", "selective", "full")}

    def settled(wanted: tuple[int, ...], by: str, mode: str = "none") -> tuple[str, int]:
        found = chosen(peak(counts["none"], counts[by], wanted) / GIB, mode)[2]
        return found.mode, len(found.blocks)

    assert settled((0,), "selective") == ("selective", 1)
    assert settled((0, 1, 2), "selective") == ("selective", 3)
    assert settled((0, 1, 2), "full") == ("full", 3)
    assert settled((0,), "full", mode="full") == ("full", 1)
    assert settled((0, 1, 2), "full", mode="full") == ("full", 3)
    least = peak(counts["none"], counts["full"], range(3)) / GIB
    with pytest.raises(UserMistake, match=r"activation\.budget=.*cannot be met.*\(full\).*256 tokens") as caught:
        chosen(0.99 * least)
    named = float(str(caught.value).split("Set activation.budget=")[1].split(" ")[0])
    assert least <= named < 1.1 * least
    assert chosen(named)[2].mode == "full"
    with pytest.raises(UserMistake, match=r"activation\.mode=full"):
        chosen(least, "selective")


def test_without_a_budget_every_block_follows_the_mode() -> None:
    _, layers, settled = chosen(None, "selective")
    assert (settled.mode, settled.blocks, settled.notes) == ("selective", layers, ())


@pytest.mark.parametrize("number", [1, 2])
def test_gradients_keep_every_bit_whatever_the_budget(number: int) -> None:
    def gradients(mode: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module, layers = trainee("llama", None, "cpu")
        enable(module.model, layers[:number], mode)
        module(LossRequest(packed(), scale=1.0)).loss.backward()
        return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}

    expected = gradients("none")
    assert all(torch.equal(value, expected[name]) for name, value in gradients("full").items())


def test_a_model_whose_pass_depends_on_values_says_so() -> None:
    module, layers = trainee("llama", None, "meta")
    inner = layers[0].mlp.forward

    def looks(hidden: Tensor) -> Tensor:
        return inner(hidden) if bool(hidden.sum() > 0) else hidden

    layers[0].mlp.forward = looks
    with pytest.raises(UserMistake, match=r"activation\.budget: .*cannot be counted ahead"):
        footprint(module, layers, "none", Shape(1, 64, packed=True), CPU, NUMBERS)


def test_documents_in_rows_of_their_own() -> None:
    module, layers = trainee("llama", None, "meta")
    counted = footprint(module, layers, "none", Shape(4, 64, packed=False), CPU, NUMBERS)
    real, _ = trainee("llama", None, "cpu")
    batch = replace(
        packed(), input_ids=torch.arange(256).view(4, 64), position_ids=torch.arange(64).repeat(4, 1), cu_seqlens=None,
        attention_mask=torch.ones(4, 64, dtype=torch.bool), lengths=(64,) * 4, max_length=64,
    )  # fmt: skip
    assert counted.total == pytest.approx(really_kept(real, batch), rel=0.05)
