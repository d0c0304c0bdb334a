"""Going on from a checkpoint: ten steps are five, a new process's five, bit for bit; under another engine, to 1e-5."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distft.checkpoint import layout
from distft.checkpoint.ranks import Ranks
from distft.checkpoint.state import TrainState, check_base, hash_base, load, owned, peek, save, verify_saved
from distft.config.schema import Run
from distft.errors import NegativeVerdict, UserMistake
from distft.strategy.base import Strategy
from distft.world import World
from tests.parity import engine
from tests.parity.engine import Case, prepared, take, train
from tests.parity.reference import Recipe, documents
from tests.pool import Pool

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
LAYOUTS = [(strategy, num_ranks) for strategy in STRATEGIES for num_ranks in (1, 2)] + [("hsdp", 4)]
HALF = 5
FULL = Recipe(optimizer="adamw", lr=0.01, tied=True, clip=1.0)
LORA = replace(FULL, tuning="lora")
RECIPES = {"full": FULL, "lora": LORA}


@dataclass
class Half:
    """What five steps gave: losses and norms on every rank, this rank's ranges, all weights on rank 0."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    ranges: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    num_updates: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def steps(strategy: Strategy, world: World, case: Case, first: int, num_steps: int = HALF) -> Half:
    half = Half()
    for index in range(first, first + num_steps):
        loss, norm = train(strategy, world, case, index % len(documents()))
        half.losses.append(loss)
        half.norms.append(norm)
    half.ranges = {f"{shard.kind}/{shard.name}": shard.tensor.detach().clone() for shard in strategy.shards()}
    half.weights = take(strategy)
    half.num_updates = strategy.num_updates
    return half


def uninterrupted(world: World, case: Case, folder: Path) -> Half:
    """Ten steps with a checkpoint after the fifth; the second half is returned."""
    strategy = prepared(world, case)
    steps(strategy, world, case, 0)
    state = TrainState(HALF, cursor={"epoch": 0, "bins": {"a": 3}}, best=0.5, best_step=3, identity={"seed": 1})
    saved = save(folder, strategy, state, world, keep=2, engine=case.strategy)
    verify_saved(saved, owned(strategy), Ranks(world))
    return steps(strategy, world, case, HALF)


def resumed(world: World, case: Case, folder: Path, harm: str = "") -> Half:
    """The second half by a fresh trainee. `harm`: what a wrong way of loading would leave out."""
    strategy = prepared(world, case)
    if harm == "no refresh":
        strategy.refresh = lambda: None  # type: ignore[method-assign]
    said: list[str] = []
    state = load(folder, strategy, world, said.append)
    for shard in strategy.shards():
        if harm == "no moments" and shard.kind != "param":
            shard.tensor.zero_()
    if harm == "no number of updates":
        strategy.num_updates = 0
    half = steps(strategy, world, case, state.step)
    half.state, half.said = dict(vars(state)), said
    return half


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal in every bit."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(one[key].view(torch.int32), other[key].view(torch.int32)) for key in one)


def alike(one: Half, other: Half) -> bool:
    numbers = (one.losses, one.norms, one.num_updates) == (other.losses, other.norms, other.num_updates)
    return numbers and same(one.ranges, other.ranges) and same(one.weights, other.weights)


Trained = Callable[[Case, int], tuple[list[Half], Path]]


@pytest.fixture(scope="module")
def trained(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained(case, num_ranks)`: the second half of an uninterrupted run, and where its checkpoint lies.

    Computed once for all tests of this file, which only read it.
    """
    known: dict[tuple[Case, int], tuple[list[Half], Path]] = {}

    def once(case: Case, num_ranks: int) -> tuple[list[Half], Path]:
        if (case, num_ranks) not in known:
            folder = tmp_path_factory.mktemp("trained")
            known[case, num_ranks] = pool(num_ranks).run(uninterrupted, case, folder), folder
        return known[case, num_ranks]

    return once


@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize(("strategy", "num_ranks"), LAYOUTS)
def test_ten_steps_are_five_and_five(
    pool: Callable[[int], Pool], trained: Trained, strategy: str, num_ranks: int, recipe_name: str
) -> None:
    case = Case(strategy, 1, RECIPES[recipe_name])
    whole, folder = trained(case, num_ranks)
    again = pool(num_ranks).run(resumed, case, folder)
    for one, other in zip(whole, again, strict=True):
        assert alike(one, other)
        assert other.num_updates == 2 * HALF
        assert other.state["cursor"] == {"epoch": 0, "bins": {"a": 3}}
        assert (other.state["best"], other.state["best_step"], other.state["identity"]) == (0.5, 3, {"seed": 1})
        assert not other.said


@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize(("strategy", "num_ranks"), [(strategy, 2) for strategy in STRATEGIES] + [("hsdp", 4)])
def test_ten_steps_are_five_and_five_in_bf16(
    pool: Callable[[int], Pool], tmp_path: Path, strategy: str, num_ranks: int, recipe_name: str
) -> None:
    case = Case(strategy, 1, RECIPES[recipe_name], precision="bf16")
    whole = pool(num_ranks).run(uninterrupted, case, tmp_path)
    for one, other in zip(whole, pool(num_ranks).run(resumed, case, tmp_path), strict=True):
        assert alike(one, other)


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_a_host_optimizer_resumes_too(pool: Callable[[int], Pool], trained: Trained, tmp_path: Path, zero: str) -> None:
    case = Case(zero, 1, FULL)
    whole = pool(2).run(offloaded, case, tmp_path, uninterrupted)
    again = pool(2).run(offloaded, case, tmp_path, resumed)
    plain, _ = trained(case, 2)
    for one, other, near in zip(whole, again, plain, strict=True):
        assert alike(one, other)
        assert one.losses == pytest.approx(near.losses, rel=1e-5)


def offloaded(world: World, case: Case, folder: Path, half: Callable[[World, Case, Path], Half]) -> Half:
    """`half` with `strategy.deepspeed.zero_optimization.offload_optimizer.device=cpu`."""
    plain = engine.run_of

    def with_host_optimizer(case: Case) -> Run:
        run = plain(case)
        run.strategy.deepspeed = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
        return run

    engine.run_of = with_host_optimizer
    try:
        return half(world, case, folder)
    finally:
        engine.run_of = plain


@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("zero2", 2), ("fsdp", 2)),
        (("fsdp", 2), ("zero3", 2)),
        (("zero3", 2), ("zero1", 1)),
        (("ddp", 1), ("hsdp", 4)),
        (("hsdp", 4), ("zero2", 2)),
        (("zero3_offload", 1), ("ddp", 2)),
    ],
)
def test_another_engine_and_number_of_ranks_goes_on(
    pool: Callable[[int], Pool], trained: Trained, written: tuple[str, int], read: tuple[str, int], recipe_name: str
) -> None:
    recipe = RECIPES[recipe_name]
    [whole, *_], folder = trained(Case(written[0], 1, recipe), written[1])
    other = pool(read[1]).run(resumed, Case(read[0], 2, recipe), folder)[0]
    assert other.losses == pytest.approx(whole.losses, rel=1e-5)
    assert other.norms == pytest.approx(whole.norms, rel=1e-5)
    assert other.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.allclose(other.weights[name], weight, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("harm", ["no refresh", "no moments", "no number of updates"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_what_loading_must_not_leave_out(
    pool: Callable[[int], Pool], trained: Trained, strategy: str, harm: str
) -> None:
    """Negative control of the equality above. ZeRO-3 has copies to refresh in bf16 alone: in fp32 it computes with the
    master itself."""
    precision = "bf16" if (strategy, harm) == ("zero3", "no refresh") else "fp32"
    case = Case(strategy, 1, FULL, precision=precision)
    whole, folder = trained(case, 2)
    again = pool(2).run(resumed, case, folder, harm)
    assert not any(alike(one, other) for one, other in zip(whole, again, strict=True))


# --- damage ----------------------------------------------------------------------------------------------------------

DAMAGE = Case("zero2", 1, Recipe(optimizer="adamw", lr=0.01))


def two_checkpoints(world: World, folder: Path) -> list[float]:
    """Checkpoints after steps 2 and 3; the losses of steps 3 to 7."""
    strategy = prepared(world, DAMAGE)
    losses = []
    for index in range(7):
        if index in (2, 3):
            save(folder, strategy, TrainState(index), world, keep=2, engine=DAMAGE.strategy)
        losses.append(train(strategy, world, DAMAGE, index % len(documents()))[0])
    return losses[2:]


def flip_a_bit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - 9)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def edit_the_manifest(path: Path) -> None:
    manifest = path.parent / layout.MANIFEST
    values = json.loads(manifest.read_text())
    values["state"]["step"] = 99
    manifest.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def sound(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run folder with two sound checkpoints, of which the newer is taken; the losses that follow the older."""
    folder = tmp_path_factory.mktemp("sound")
    losses = pool(2).run(two_checkpoints, folder)[0]
    assert layout.steps(folder) == [2, 3]
    taken = pool(2).run(resumed, DAMAGE, folder)
    assert (taken[0].state["step"], taken[0].said) == (3, [])
    return folder, losses


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip_a_bit, "rank-00001.safetensors was changed"),
        (truncate, "rank-00001.safetensors has"),
        (Path.unlink, "rank-00001.safetensors is missing"),
        (edit_the_manifest, "manifest.json was changed"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    pool: Callable[[int], Pool],
    sound: tuple[Path, list[float]],
    tmp_path: Path,
    damage: Callable[[Path], None],
    told: str,
) -> None:
    folder, losses = sound
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "step-000003" / layout.rank_file(1))
    passed = pool(2).run(resumed, DAMAGE, tmp_path)
    assert [half.state["step"] for half in passed] == [2, 2]
    assert passed[0].losses == losses
    assert told in passed[0].said[0]
    assert not passed[1].said

    damage(tmp_path / "checkpoints" / "step-000002" / layout.rank_file(1))
    with pytest.raises(UserMistake, match=r"no checkpoint of .* is sound"):
        pool(2).run(resumed, DAMAGE, tmp_path)


def reread(world: World, folder: Path, damaged: bool) -> None:
    strategy = prepared(world, DAMAGE)
    train(strategy, world, DAMAGE, 0)
    saved = save(folder, strategy, TrainState(1), world, keep=1, engine=DAMAGE.strategy)
    if damaged and world.is_main:
        flip_a_bit(saved / layout.rank_file(0))
    if world.size > 1:
        torch.distributed.barrier()
    verify_saved(saved, owned(strategy), Ranks(world))


def test_what_was_written_is_compared_with_what_is_trained(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    pool(2).run(reread, tmp_path / "good", False)
    with pytest.raises(NegativeVerdict, match="of rank 0"):
        pool(2).run(reread, tmp_path / "bad", True)


def test_a_checkpoint_of_something_else_is_refused(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    pool(2).run(uninterrupted, Case("zero2", 1, LORA), tmp_path / "lora")
    with pytest.raises(UserMistake, match=r"is not trained now|it has no"):
        pool(2).run(resumed, Case("zero2", 1, FULL), tmp_path / "lora")
    pool(2).run(uninterrupted, Case("ddp", 1, replace(FULL, optimizer="sgd")), tmp_path / "sgd")
    with pytest.raises(UserMistake, match="it has no exp_avg"):
        pool(2).run(resumed, Case("ddp", 1, FULL), tmp_path / "sgd")
    with pytest.raises(UserMistake, match="holds no complete checkpoint"):
        pool(2).run(resumed, Case("ddp", 1, FULL), tmp_path / "nothing")


# --- a disk that refuses ---------------------------------------------------------------------------------------------


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond that fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_on_a_full_disk(world: World, folder: Path) -> tuple[str, list[int], bool]:
    """The second checkpoint cannot be written by rank 1. What is told, what is left, and whether training goes on."""
    strategy = prepared(world, DAMAGE)
    train(strategy, world, DAMAGE, 0)
    save(folder, strategy, TrainState(1), world, keep=2, engine=DAMAGE.strategy)
    told = ""
    with largest_file(4096 if world.rank == 1 else resource.RLIM_INFINITY):
        try:
            save(folder, strategy, TrainState(2), world, keep=2, engine=DAMAGE.strategy)
        except UserMistake as mistake:
            told = str(mistake)
    loss, _ = train(strategy, world, DAMAGE, 1)
    return told, layout.steps(folder), loss == loss


def test_a_full_disk_is_told_on_every_rank(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    for told, left, goes_on in pool(2).run(save_on_a_full_disk, tmp_path):
        assert "rank 1" in told
        assert "Free space" in told
        assert left == [1]
        assert goes_on
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))


# --- the base --------------------------------------------------------------------------------------------------------


def hashes_of(world: World, folder: Path) -> dict[str, str]:
    return hash_base(folder, world)


def test_another_base_is_refused(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"model-{number}.safetensors").write_bytes(os.urandom(1000))
    before, other_rank = pool(2).run(hashes_of, tmp_path)
    assert before == other_rank == pool(1).run(hashes_of, tmp_path)[0]
    assert sorted(before) == [f"model-{number}.safetensors" for number in range(3)]
    state = TrainState(base_hashes=before)
    check_base(state, before, tmp_path)
    flip_a_bit(tmp_path / "model-1.safetensors")
    with pytest.raises(UserMistake, match="model-1"):
        check_base(state, pool(1).run(hashes_of, tmp_path)[0], tmp_path)


def test_peek_reads_the_newest_sound_state(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    assert peek(tmp_path) is None
    pool(2).run(two_checkpoints, tmp_path)
    assert step_seen(tmp_path) == 3
    assert step_seen(layout.step_folder(tmp_path, 2)) == 2
    edit_the_manifest(tmp_path / "checkpoints" / "step-000003" / layout.rank_file(0))
    assert step_seen(tmp_path) == 2


def step_seen(source: Path) -> int:
    state = peek(source)
    assert state is not None
    return state.step
