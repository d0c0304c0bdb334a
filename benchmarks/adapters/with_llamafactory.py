"""LLaMA-Factory through `llamafactory-cli train`."""

from __future__ import annotations

import json
from pathlib import Path

from adapters import (
    BINS,
    LORA_ALPHA,
    LORA_RANK,
    SEQUENCE_LENGTH,
    Started,
    Work,
    trainer_arguments,
)

SETTINGS = {
    "packed": "neat packing, one row a pass, sdpa",
    "packed, 2 a pass": "neat packing, both rows in one pass, sdpa",
    "padded": "all rows of a step in one pass, sdpa",
}


def start(python: Path, work: Work, setting: str) -> Started:
    if setting == "packed":
        shape = trainer_arguments(work, 1, BINS // work.ranks)
    elif setting == "packed, 2 a pass":
        shape = trainer_arguments(work, BINS // work.ranks)
    else:
        shape = trainer_arguments(work, work.rows_a_step // work.ranks)
    packed = setting.startswith("packed")
    given = {
        **shape,
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(work.model),
        "finetuning_type": "lora" if work.lora else "full",
        "template": "chatml",
        "dataset_dir": str(work.folder),
        "dataset": "rows",
        "cutoff_len": SEQUENCE_LENGTH,
        "packing": packed,
        "neat_packing": packed,
        "train_on_prompt": work.train_on == "all",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": not work.checkpointing,
        "plot_loss": False,
        **(
            {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "lora_target": "all"}
            if work.lora
            else {}
        ),
    }
    dataset = {
        "file_name": str(work.rows),
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    (work.folder / "dataset_info.json").write_text(json.dumps({"rows": dataset}), encoding="utf-8")
    file = work.folder / "given.yaml"
    file.write_text(json.dumps(given, indent=1), encoding="utf-8")  # JSON is YAML
    ranks = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(work.ranks)} if work.ranks > 1 else {}
    environment = {**ranks, "DISABLE_VERSION_CHECK": "0", "PATH": f"{python.parent}:/usr/bin:/bin"}
    return Started([str(python.parent / "llamafactory-cli"), "train", str(file)], environment)
