"""`strategy.deepspeed`: what is refused and why, what passes, and that the known keys are those of the library."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from distft.config import deepspeed as rules
from distft.config.schema import Run
from distft.strategy.zero_settings import STAGES, merge, settings
from distft.world import World

WORLD = World(0, 2, 0, 0, 2, torch.device("cpu"))


def found(section: dict[str, Any], strategy: str = "zero3") -> list[str]:
    run = Run()
    run.strategy.name, run.strategy.deepspeed = strategy, section
    return rules.problems(run)


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


@pytest.mark.parametrize(
    ("section", "cure"),
    [
        ({"train_batch_size": 8}, "batch.global_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "batch.micro_size"),
        ({"gradient_accumulation_steps": 4}, "batch.global_size"),
        ({"optimizer": {"type": "Adam"}}, "optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule"),
        ({"gradient_clipping": 1.0}, "optim.clip"),
        ({"bf16": {"enabled": True}}, "precision"),
        ({"fp16": {"enabled": True}}, "precision"),
        ({"activation_checkpointing": {}}, "activation.mode"),
        ({"wandb": {"enabled": True}}, "log=wandb"),
        (zero(stage=3), "strategy=zero1"),
        (zero(zero_hpz_partition_size=8), "hpZ"),
        (zero(mics_shard_size=8), "MiCS"),
        (zero(zero_quantized_weights=True), "ranges"),
        (zero(offload_optimizer={"device": "nvme"}), "cpu or none"),
        (zero(offload_optimizer={"device": "cpu", "nvme_path": "/x"}), "NVMe"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "ranges"),
        (zero(offload_param={"device": "nvme"}), "cpu or none"),
        (zero(round_robin_gradients=True), "ranges"),
        (zero(reduce_buckt_size=5), "did you mean reduce_bucket_size?"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        (zero(leaf_module={"class": []}), "did you mean classes?"),
        (zero(reduce_bucket_size="auto"), "Leave the key out"),
        (zero(reduce_bucket_size=1.5), "a whole number"),
        (zero(reduce_bucket_size=True), "a whole number"),
        (zero(overlap_comm=1), "true or false"),
        ({"zero_optimization": 3}, "a mapping"),
        (zero(allgather_bucket_size=5), "only zero1 and zero2 would read it"),
    ],
)
def test_one_problem_with_its_cure(section: dict[str, Any], cure: str) -> None:
    problems = found(section)
    assert len(problems) == 1, problems
    assert problems[0].startswith("strategy.deepspeed.")
    assert cure in problems[0]


def test_all_problems_at_once() -> None:
    assert len(found({"optimizer": {}, "bf16": {}, **zero(stage=2, nonsense=1, reduce_bucket_size=-1)})) == 5


@pytest.mark.parametrize(
    ("strategy", "section"),
    [
        ("zero1", zero(reduce_bucket_size=5e8, allgather_bucket_size=1000)),
        ("zero2", zero(overlap_comm=False, offload_optimizer={"device": "cpu", "pin_memory": False})),
        ("zero3", zero(stage3_max_live_parameters=0, sub_group_size=1000, leaf_module={"classes": ["Block"]})),
        ("zero3_offload", zero(offload_param={"device": "none"}, contiguous_gradients=False)),
        ("zero2", {"wall_clock_breakdown": True, "log_level": "info", "flops_profiler": {"enabled": True}}),
    ],
)
def test_what_may_be_given(strategy: str, section: dict[str, Any]) -> None:
    assert found(section, strategy) == []


def test_what_a_stage_does_not_read_is_refused() -> None:
    assert "only zero3" in found(zero(stage3_max_live_parameters=5), "zero2")[0]
    assert "only zero3" in found(zero(offload_param={"device": "cpu"}), "zero1")[0]
    assert "nothing to overlap" in found(zero(overlap_comm=True), "zero1")[0]


def test_ours_stand_above_and_the_rest_below() -> None:
    run = Run()
    run.strategy.name = "zero3_offload"
    own = zero(reduce_bucket_size=7, offload_param={"device": "none"})
    run.strategy.deepspeed = {"wall_clock_breakdown": True, **own}
    config = settings(run, WORLD, bf16=True, num_trained=1000)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["offload_param"]["device"] == "none"
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["bf16"]["enabled"] is True
    assert run.strategy.deepspeed["zero_optimization"].keys() == {"reduce_bucket_size", "offload_param"}, "unchanged"
    run.strategy.deepspeed, run.optim.clip = {}, 0.0
    assert settings(run, WORLD, bf16=False, num_trained=5)["zero_optimization"]["reduce_bucket_size"] == 5
    assert settings(run, WORLD, bf16=False, num_trained=5)["gradient_clipping"] == 0.0, "absent would clip at 1.0"


def test_merging_changes_neither() -> None:
    below, above = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 2}
    assert merge(below, above) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 2}
    assert below == {"a": {"x": 1, "y": 2}, "b": 1}


# --- against the installed library ------------------------------------------------------------------------------------


class Recorder(dict[str, Any]):
    """A configuration that notes which keys DeepSpeed looks for."""

    asked: set[str] = set()  # shared with the copies that DeepSpeed makes

    def get(self, key: str, default: Any = None) -> Any:
        Recorder.asked.add(key)
        return dict.get(self, key, default)

    def __getitem__(self, key: str) -> Any:
        Recorder.asked.add(key)
        return dict.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        Recorder.asked.add(str(key))
        return dict.__contains__(self, key)

    def keys(self) -> Any:
        return self


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def fields(model: Any) -> set[str]:
        names = set(model.model_fields)
        return names | {field.alias for field in model.model_fields.values() if field.alias}

    DeepSpeedConfig(Recorder({"train_micro_batch_size_per_gpu": 1}))
    known = {"zero_optimization", *rules.DIAGNOSTICS, *rules.OWNED}
    assert not Recorder.asked - known, "DeepSpeed reads keys that are not in the lists"
    assert "optimizer" in Recorder.asked, "the recorder records"

    gone = {key for key, reason in rules.ZERO_OWNED.items() if reason == rules.REMOVED or key.startswith("mics_")}
    zero_keys = {*rules.BOTH, *rules.STAGE_1_2, *rules.STAGE_3, *rules.ZERO_OWNED}
    assert fields(DeepSpeedZeroConfig) == zero_keys - (gone - fields(DeepSpeedZeroConfig))
    assert fields(DeepSpeedZeroLeafModuleConfig) == set(rules.LEAF_MODULE)
    assert fields(DeepSpeedZeroOffloadParamConfig) == {*rules.OFFLOAD, *rules.OFFLOAD_OWNED["offload_param"]}
    assert fields(DeepSpeedZeroOffloadOptimizerConfig) == {*rules.OFFLOAD, *rules.OFFLOAD_OWNED["offload_optimizer"]}


@pytest.mark.parametrize("strategy", STAGES)
def test_deepspeed_accepts_what_we_hand_it(strategy: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = Run()
    run.strategy.name = strategy
    config = DeepSpeedConfig(settings(run, WORLD, bf16=False, num_trained=1000))
    assert config.managed_gradient_accumulation is False
    assert config.gradient_clipping == run.optim.clip
    assert config.steps_per_print is None
    assert config.zero_config.stage == STAGES[strategy]


def test_the_rules_import_neither_torch_nor_deepspeed() -> None:
    code = "import sys, distft.config.deepspeed; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
