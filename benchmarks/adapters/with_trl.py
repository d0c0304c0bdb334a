"""TRL's SFTTrainer through a script as its documentation writes it."""

from __future__ import annotations

import json
from pathlib import Path

from adapters import BINS, SCRIPTS, SEQUENCE_LENGTH, Started, Work, launched, lora_arguments, trainer_arguments

SETTINGS = {
    "packed": "best fit decreasing, one row a pass, sdpa",
    "packed, 2 a pass": "best fit decreasing, both rows flattened into one pass, sdpa",
    "padded": "all rows of a step in one pass, sdpa",
    "grouped": "rows grouped by length, all of a step in one pass, sdpa",
}


def start(python: Path, work: Work, setting: str) -> Started:
    if setting == "packed":
        shape = trainer_arguments(work, 1, BINS // work.ranks)
    elif setting == "packed, 2 a pass":
        shape = trainer_arguments(work, BINS // work.ranks)
    else:
        shape = trainer_arguments(work, work.rows_a_step // work.ranks)
    arguments = {
        **shape,
        "max_length": SEQUENCE_LENGTH,
        "packing": setting.startswith("packed"),
        "packing_strategy": "bfd",
        "assistant_only_loss": work.train_on == "assistant",
        "gradient_checkpointing": work.checkpointing,
        "train_sampling_strategy": "sequential" if setting == "grouped" else "random",
    }
    given = {
        "model": str(work.model),
        "rows": str(work.rows),
        "lora": lora_arguments(work),
        "arguments": arguments,
        "batches_of": work.rows_a_step if setting == "grouped" else 0,  # see scripts/grouped.py
    }
    file = work.folder / "given.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    return Started([*launched(python, SCRIPTS / "train_with_trl.py", work.ranks), str(file)], {})
