"""DeepSpeed's configuration of a run: ours over the user's `strategy.deepspeed`, whose rules are in distft/config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distft.config.schema import Run

if TYPE_CHECKING:
    from distft.world import World

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
LARGEST_BUCKET = 100_000_000  # elements reduced at a time; in fp32 a GPU holds 400 MB (with overlap twice) for it


def settings(run: Run, world: World, bf16: bool, num_trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's `strategy.deepspeed` section with ours on top."""
    name, cuda = run.strategy.name, world.device.type == "cuda"
    stage = STAGES[name]
    # With nobody to send to, a bucket would only copy gradients: larger than any bucket, each stays where it is.
    alone = world.size == 1 and stage < 3
    zero: dict[str, Any] = {
        "overlap_comm": cuda and stage >= 2 and not alone,
        "reduce_bucket_size": 1 if alone else max(1, min(LARGEST_BUCKET, num_trained)),
        "contiguous_gradients": not alone,
    }
    if name == "zero3_offload":
        host = {"device": "cpu", "pin_memory": cuda}
        zero |= {"offload_optimizer": host, "offload_param": dict(host)}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # a formality: batches never pass through DeepSpeed
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the loop's call of `step` is the boundary
        "gradient_clipping": run.optim.clip,  # absent would mean 1.0; 0.0: none
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "communication_data_type": run.strategy.communication,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW on the host, nothing is compiled
        "steps_per_print": None,
        "log_level": run.strategy.deepspeed.get("log_level", "error"),
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every step
    }
    return merge(merge({"zero_optimization": zero}, dict(run.strategy.deepspeed)), ours)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; sections are merged key by key. Neither argument is changed."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged
