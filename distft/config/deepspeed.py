"""The rules of `strategy.deepspeed`, the section that is handed to DeepSpeed.

What distft decides is refused and names distft's own knob; what would break its checkpoints or would be ignored is
refused with the reason; an unknown key names the nearest known one. The keys are those of DeepSpeed 0.19.8, kept here
as data so that a configuration is checked without importing it (a test compares them with the installed version).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distft.config.schema import Run
from distft.config.words import nearest

SECTION = "strategy.deepspeed"

DIAGNOSTICS: dict[str, type] = {
    "comms_logger": dict,
    "disable_python_gc": bool,
    "dump_state": bool,
    "flops_profiler": dict,
    "log_level": str,
    "memory_breakdown": bool,
    "wall_clock_breakdown": bool,
}
"""Keys beside `zero_optimization` that may be given."""

ONE_STEP = "batch.global_size and batch.micro_size decide it"
GRADIENTS = "distft sums gradients over all ranks"
SAVING = "distft writes its own checkpoints: checkpoint.every, checkpoint.keep"
TRACKING = "choose a tracker with log=wandb or log=tensorboard"
ABSENT = "distft does not use this part of DeepSpeed"
REMOVED = "DeepSpeed 0.19 has removed it"

OWNED: dict[str, str] = {
    "activation_checkpointing": "use activation.mode",
    "aio": "it serves NVMe offload, which distft's checkpoints cannot read",
    "amp": REMOVED,
    "autotuning": ABSENT,
    "bf16": "use precision",
    "bfloat16": "use precision",
    "checkpoint": SAVING,
    "comet": TRACKING,
    "communication_data_type": "use strategy.communication",
    "compile": ABSENT,
    "compression_training": REMOVED,
    "csv_monitor": "metrics.jsonl has every record",
    "curriculum_learning": REMOVED,
    "data_efficiency": ABSENT,
    "data_types": "use precision",
    "dataloader_drop_last": "distft reads its own data",
    "datastates_ckpt": SAVING,
    "disable_allgather": ABSENT,
    "eigenvalue": REMOVED,
    "elasticity": REMOVED,
    "expert_parallel": ABSENT,
    "fp16": "use precision (fp16 is not offered: bf16 needs no loss scaling)",
    "gradient_accumulation_steps": ONE_STEP,
    "gradient_allreduce_op": GRADIENTS,
    "gradient_clipping": "use optim.clip",
    "gradient_predivide_factor": GRADIENTS,
    "graph_harvesting": REMOVED,
    "hybrid_engine": ABSENT,
    "managed_gradient_accumulation": ONE_STEP,
    "nebula": REMOVED,
    "optimizer": "use optim",
    "pipeline": ABSENT,
    "prescale_gradients": GRADIENTS,
    "progressive_layer_drop": REMOVED,
    "quantize_training": REMOVED,
    "scheduler": "use schedule",
    "seq_parallel_communication_data_type": ABSENT,
    "sequence_parallel_size": ABSENT,
    "data_parallel_size": ABSENT,
    "sparse_attention": REMOVED,
    "sparse_gradients": REMOVED,
    "steps_per_print": "use log.every",
    "tensor_parallel": ABSENT,
    "tensorboard": TRACKING,
    "timers": "distft measures throughput without waiting for the device",
    "torch_autocast": "use precision",
    "train_batch_size": "use batch.global_size",
    "train_micro_batch_size_per_gpu": "use batch.micro_size",
    "use_data_before_expert_parallelism": ABSENT,
    "vocabulary_size": ABSENT,
    "wandb": TRACKING,
    "weight_quantization": "quantised weights break the ranges that checkpoints are made of",
    "zero_allow_untested_optimizer": "use optim.name",
    "zero_force_ds_cpu_optimizer": "distft uses torch's fused AdamW on the host",
}
"""Keys that are refused, with what to do instead or why."""

BOTH: dict[str, type] = {
    "contiguous_gradients": bool,
    "offload_optimizer": dict,
    "overlap_comm": bool,
    "reduce_bucket_size": int,
    "reduce_scatter": bool,
}
STAGE_1_2: dict[str, type] = {
    "allgather_bucket_size": int,
    "ignore_unused_parameters": bool,
    "parameter_alignment": bool,
    "use_multi_rank_bucket_allreduce": bool,
}
STAGE_3: dict[str, type] = {
    "allgather_sequential": bool,
    "enable_sanity_checks": bool,
    "leaf_module": dict,
    "log_trace_cache_warnings": bool,
    "max_live_parameters": int,
    "max_reuse_distance": int,
    "memory_efficient_linear": bool,
    "model_persistence_threshold": int,
    "module_granularity_threshold": int,
    "offload_param": dict,
    "param_persistence_threshold": int,
    "prefetch_bucket_size": int,
    "stage3_allgather_sequential": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_model_persistence_threshold": int,
    "stage3_module_granularity_threshold": int,
    "stage3_param_persistence_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "sub_group_size": int,
    "use_all_reduce_for_fetch_params": bool,
}
"""Keys of `zero_optimization` by the stages that read them."""

RANGES = "it breaks the flat ranges that checkpoints are made of"
WRITES = "distft writes final/ and the checkpoints itself"
ZERO_OWNED: dict[str, str] = {
    "allgather_partitions": "DeepSpeed ignores it",
    "compute_grad_norm": "every step needs the norm",
    "cpu_offload": "use offload_optimizer, or strategy=zero3_offload",
    "cpu_offload_param": "use strategy=zero3_offload",
    "cpu_offload_use_pin_memory": "use offload_optimizer.pin_memory",
    "elastic_checkpoint": WRITES,
    "gather_16bit_weights_on_model_save": WRITES,
    "stage3_gather_16bit_weights_on_model_save": WRITES,
    "stage3_gather_fp16_weights_on_model_save": WRITES,
    "legacy_stage1": REMOVED,
    "load_from_fp32_weights": WRITES,
    "mics_hierarchical_params_gather": f"MiCS: {RANGES}",
    "mics_shard_size": f"MiCS: {RANGES}; use strategy=hsdp",
    "override_module_apply": "the model is born on meta, where it does nothing",
    "pipeline_loading_checkpoint": ABSENT,
    "round_robin_gradients": RANGES,
    "save_muon_momentum_buffer_in_memory": ABSENT,
    "stage": "use strategy=zero1, zero2 or zero3",
    "zenflow": RANGES,
    "zero_hpz_partition_size": f"hpZ: {RANGES}; use strategy=hsdp",
    "zero_quantized_gradients": "gradients are reduced in fp32",
    "zero_quantized_nontrainable_weights": RANGES,
    "zero_quantized_weights": RANGES,
    "zeropp_loco_param": REMOVED,
}
OFFLOAD: dict[str, type] = {"device": str, "pin_memory": bool}
NVME = "it serves NVMe offload, which distft's checkpoints cannot read"
OFFLOAD_OWNED: dict[str, dict[str, str]] = {
    "offload_param": {"buffer_count": NVME, "buffer_size": NVME, "max_in_cpu": NVME, "nvme_path": NVME},
    "offload_optimizer": {
        "buffer_count": NVME,
        "cpuadam_cores_perc": ABSENT,
        "fast_init": NVME,
        "nvme_path": NVME,
        "pipeline_read": NVME,
        "pipeline_write": NVME,
        "ratio": f"with a part only, {RANGES}",
        "super_offload": RANGES,
    },
}
LEAF_MODULE: dict[str, type] = {"classes": list, "name_suffixes": list, "names": list}


def problems(run: Run) -> list[str]:
    """Every problem of `strategy.deepspeed` under the chosen zero strategy."""
    return list(section(run.strategy.deepspeed, run.strategy.name))


def section(values: dict[str, Any], strategy: str) -> Iterator[str]:
    yield from keys(values, SECTION, {"zero_optimization": dict, **DIAGNOSTICS}, OWNED)
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    stage_3 = strategy.startswith("zero3")
    where = f"{SECTION}.zero_optimization"
    foreign = STAGE_1_2 if stage_3 else STAGE_3
    unread = dict.fromkeys(foreign, f"only {'zero1 and zero2' if stage_3 else 'zero3'} would read it")
    yield from keys(zero, where, {**BOTH, **(STAGE_3 if stage_3 else STAGE_1_2)}, {**ZERO_OWNED, **unread})
    if strategy == "zero1" and zero.get("overlap_comm") is True:
        yield f"{where}.overlap_comm: zero1 reduces once a step and has nothing to overlap; use strategy=zero2."
    for key in ("offload_param", "offload_optimizer"):
        if isinstance(zero.get(key), dict) and key not in unread:
            yield from keys(zero[key], f"{where}.{key}", OFFLOAD, OFFLOAD_OWNED[key])
            if zero[key].get("device", "cpu") not in ("cpu", "none"):
                device = zero[key]["device"]
                yield f"{where}.{key}.device={device}: cpu or none is wanted (checkpoints cannot read NVMe offload)."
    if isinstance(zero.get("leaf_module"), dict) and stage_3:
        yield from keys(zero["leaf_module"], f"{where}.leaf_module", LEAF_MODULE, {})


def keys(values: dict[str, Any], where: str, known: dict[str, type], owned: dict[str, str]) -> Iterator[str]:
    """Problems of one mapping's own keys."""
    for key, value in values.items():
        if key in owned:
            yield f"{where}.{key} cannot be set: {owned[key]}."
        elif key not in known:
            meant = nearest(str(key), [*known, *owned])
            yield f"{where}.{key} is unknown to DeepSpeed" + (f"; did you mean {meant}?" if meant else ".")
        elif value == "auto":
            yield f"{where}.{key}=auto: DeepSpeed knows no auto. Leave the key out for its default."
        elif not fits(value, known[key]):
            yield f"{where}.{key}={value}: {WANTED[known[key]]} is wanted."


WANTED = {
    bool: "true or false",
    int: "a whole number, 0 or more",
    str: "a word",
    dict: "a mapping {key: value}",
    list: "a list [a,b]",
}


def fits(value: Any, wanted: type) -> bool:
    if wanted is int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and value >= 0 and value == int(value)
    return isinstance(value, wanted)
