"""Words of other trainers, and what they are called here: for whoever has them in their fingers.

They are those of transformers' TrainingArguments, TRL's SFTConfig, PEFT's LoraConfig, DeepSpeed's JSON, and of the YAML
files of LLaMA-Factory, axolotl, torchtune and torchtitan.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from distft.config.words import nearest

BY_KNOB = {
    "model.path": "model_name_or_path base_model pretrained_model_name_or_path model_name model_id",
    "model.attention": "attn_implementation flash_attn flash_attention sdp_attention",
    "model.kernels": "use_liger_kernel enable_liger_kernel liger_kernel",
    "model.compile": "torch_compile",
    "data.path": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data",
    "data.eval_path": "eval_dataset validation_file test_datasets",
    "data.eval_fraction": "val_size val_set_size validation_split_percentage test_size",
    "data.sequence_length": "max_seq_length max_seq_len max_length cutoff_len sequence_len seq_len seq_length "
    "block_size model_max_length context_length",
    "data.packing": "sample_packing",
    "data.train_on": "train_on_inputs train_on_input assistant_only_loss completion_only_loss train_on_prompt",
    "data.chat_template": "template",
    "data.workers": "preprocessing_num_workers dataset_num_proc dataloader_num_workers dataset_processes",
    "tuning": "finetuning_type use_lora use_peft peft adapter train_type",
    "tuning.lora_rank": "lora_r r rank",
    "tuning.lora_alpha": "alpha",
    "tuning.target": "target_modules lora_target lora_target_modules lora_target_linear",
    "tuning.rslora": "use_rslora peft_use_rslora",
    "tuning.dora": "use_dora peft_use_dora",
    "strategy": "zero_stage zero_optimization parallelism fsdp_version sharding_strategy",
    "optim": "optimizer optim_type",
    "optim.lr": "learning_rate max_lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon epsilon",
    "optim.clip": "max_grad_norm gradient_clipping max_norm clip_grad_norm gradient_clip_val",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "schedule.warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "schedule.final": "min_lr min_lr_ratio min_lr_rate lr_min",
    "batch.micro_size": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu "
    "per_device_eval_batch_size local_batch_size",
    "batch.global_size": "gradient_accumulation_steps train_batch_size batch_size global_batch_size "
    "effective_batch_size",
    "activation.mode": "gradient_checkpointing activation_checkpointing activation_checkpoint",
    "precision": "fp16 bf16 dtype torch_dtype mixed_precision",
    "epochs": "num_train_epochs num_epochs",
    "max_steps": "train_steps total_steps num_steps training_steps max_train_steps",
    "eval.every": "eval_steps eval_interval evals_per_epoch",
    "checkpoint.every": "save_steps save_interval saves_per_epoch checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_latest_k",
    "checkpoint.best": "metric_for_best_model",
    "checkpoint.mode": "greater_is_better",
    "early_stopping.patience": "early_stopping_patience",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "log": "report_to",
    "log.every": "logging_steps log_every_n_steps log_freq",
    "log.project": "wandb_project",
    "run.dir": "output_dir save_dir",
    "run.name": "run_name wandb_name wandb_run_id",
    "launch.ranks": "nproc_per_node num_gpus n_gpus num_processes num_devices world_size",
    "launch.nodes": "nnodes num_nodes num_machines",
    "launch.hostfile": "hosts",
}
HERE = {word: knob for knob, words in BY_KNOB.items() for word in words.split()}


def meant(word: str, names: Collection[str]) -> str | None:
    """The knob or group among `names` that was probably meant by a key or flag that does not exist."""
    plain = re.sub(r"^-+", "", word).replace("-", "_")
    last = plain.rpartition(".")[2].lower()
    if not any(name.rpartition(".")[2] == last for name in names) and HERE.get(last) in names:
        return HERE[last]
    return nearest(plain, names)
