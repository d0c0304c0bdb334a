"""How each program is started on the same work: one file a program, each with its settings by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
LORA_RANK, LORA_ALPHA = 16, 32
LEARNING_RATE = 2e-4
SEQUENCE_LENGTH = 1024
BINS = 2  # packed rows of SEQUENCE_LENGTH tokens in a step, over all ranks


@dataclass(frozen=True)
class Work:
    """One training to be done: the same for every program."""

    model: Path
    rows: Path
    folder: Path  # empty; everything that the program writes goes there
    lora: bool
    checkpointing: bool
    train_on: str  # assistant or all
    ranks: int
    rows_a_step: int  # in a padded layout, over all ranks: about the tokens of BINS full bins
    steps: int


@dataclass(frozen=True)
class Started:
    """A command line and what it needs in its environment."""

    command: list[str]
    environment: dict[str, str]


def trainer_arguments(work: Work, rows_a_pass: int, accumulate: int = 1) -> dict[str, Any]:
    """What every program on `transformers.Trainer` is told; rows_a_pass: on one rank."""
    return {
        "output_dir": str(work.folder / "out"),
        "max_steps": work.steps,
        "per_device_train_batch_size": rows_a_pass,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
        **({"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if work.ranks > 1 else {}),
    }


def lora_arguments(work: Work) -> dict[str, Any] | None:
    """PEFT's configuration of the adapters; None: every weight is trained."""
    if not work.lora:
        return None
    return {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}


def launched(python: Path, script: Path, ranks: int) -> list[str]:
    """A script on one process, or on several under torchrun."""
    if ranks == 1:
        return [str(python), str(script)]
    return [
        str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script),
    ]  # fmt: skip
