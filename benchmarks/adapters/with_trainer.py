"""The plain transformers Trainer through a script as its documentation writes it."""

from __future__ import annotations

import json
from pathlib import Path

from adapters import SCRIPTS, SEQUENCE_LENGTH, Started, Work, launched, lora_arguments, trainer_arguments

SETTINGS = {
    "padded": "all rows of a step in one pass, sdpa",
    "grouped": "rows grouped by length, all of a step in one pass, sdpa",
    "grouped, 3 a pass": "rows grouped by length, three a pass, sdpa",
}


def start(python: Path, work: Work, setting: str) -> Started:
    each = work.rows_a_step // work.ranks
    arguments = {
        **(trainer_arguments(work, 3, each // 3) if setting.endswith("3 a pass") else trainer_arguments(work, each)),
        "gradient_checkpointing": work.checkpointing,
        "train_sampling_strategy": "random" if setting == "padded" else "sequential",
    }
    given = {
        "model": str(work.model),
        "rows": str(work.rows),
        "longest": SEQUENCE_LENGTH,
        "train_on": work.train_on,
        "lora": lora_arguments(work),
        "arguments": arguments,
        "batches_of": 0 if setting == "padded" else work.rows_a_step,  # see scripts/grouped.py
    }
    file = work.folder / "given.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    return Started([*launched(python, SCRIPTS / "train_with_trainer.py", work.ranks), str(file)], {})
