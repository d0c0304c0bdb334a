from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distft.config.schema import Optim, Schedule
from distft.optim import decays, lr_at, make_optimizer, warmup_steps


def rates(schedule: Schedule, num_steps: int = 100) -> list[float]:
    return [lr_at(step, num_steps, Optim(lr=2.0), schedule) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 4), True),
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", (2, 8), True),
        ("model.norm.weight", (8,), False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 8), False),
        ("model.gain", (), False),
    ],
)
def test_matrices_decay_and_vectors_do_not(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, shape) is expected


def test_groups_follow_the_whole_shape_and_not_the_piece_that_a_rank_holds() -> None:
    pieces = [("a.weight", nn.Parameter(torch.zeros(6))), ("norm.weight", nn.Parameter(torch.zeros(2)))]
    optimizer = make_optimizer(pieces, {"a.weight": (4, 3), "norm.weight": (4,)}, Optim(weight_decay=0.3))
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.3, 1), (0.0, 1)]
    assert all(group["lr_scale"] == 1.0 and group["fused"] for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["params"][0] is pieces[0][1]


def test_a_kind_of_parameter_that_is_absent_makes_no_group() -> None:
    optimizer = make_optimizer([("a.weight", nn.Parameter(torch.zeros(2, 2)))], {"a.weight": (2, 2)}, Optim())
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("skip", [False, True])
def test_the_kernels_scale_gradients_and_skip_on_the_device(name: str, skip: bool) -> None:
    optim = Optim(name=name, lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-6)
    weight = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    optimizer = make_optimizer([("weight", weight)], {"weight": (5, 3)}, optim)
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
    optimizer.step()
    expected = before if skip else plain_step(before, torch.full_like(before, 2.0), name)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=0 if skip else 1e-6)
    for state in optimizer.state.values():
        assert float(state.get("step", 0)) == (0 if skip else name == "adamw")


def plain_step(weight: Tensor, gradient: Tensor, name: str) -> Tensor:
    """The first step at rate 0.1 and decay 0.5: AdamW's bias correction leaves gradient / (|gradient| + eps)."""
    if name == "sgd":
        return weight - 0.1 * (gradient + 0.5 * weight)
    return weight * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-6)


def test_warm_up_is_a_share_below_one_and_steps_from_one_on() -> None:
    assert warmup_steps(200, Schedule(warmup=0.03)) == 6
    assert warmup_steps(10, Schedule(warmup=0.03)) == 1
    assert warmup_steps(10, Schedule(warmup=3)) == 3
    assert warmup_steps(10, Schedule(warmup=0)) == 0


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_warms_up_to_the_peak_and_is_never_zero(name: str) -> None:
    values = rates(Schedule(name=name, warmup=10))
    assert values[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert values[10] == max(values) == 2.0
    assert min(values) > 0
    falling = values[10:]
    assert falling == sorted(falling, reverse=True)


def test_shapes_after_warm_up() -> None:
    assert rates(Schedule(name="constant", warmup=0)) == [2.0] * 100
    linear = rates(Schedule(name="linear", warmup=0, final=0.5))
    assert linear[50] == pytest.approx(1.5)
    assert linear[99] == pytest.approx(1.01)
    cosine = rates(Schedule(name="cosine", warmup=20, final=0.1))
    assert cosine[60] == pytest.approx(1.1)  # half way from 20 to 100
    assert cosine[40] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    wsd = rates(Schedule(name="wsd", warmup=10, decay=0.2))
    assert wsd[10:81] == [2.0] * 71
    assert wsd[90] == pytest.approx(1.0)


def test_short_runs() -> None:
    assert lr_at(0, 1, Optim(lr=1.0), Schedule()) == 1.0
    assert lr_at(0, 1, Optim(lr=1.0), Schedule(name="wsd", warmup=0, decay=1)) == 1.0
    assert lr_at(2, 3, Optim(lr=1.0), Schedule(name="wsd", warmup=5)) == pytest.approx(0.6)
