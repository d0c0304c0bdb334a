"""distft through `python train.py`."""

from __future__ import annotations

from pathlib import Path

from adapters import BINS, LEARNING_RATE, LORA_ALPHA, LORA_RANK, SEQUENCE_LENGTH, Started, Work

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "packed": "rows of 1,024, one a pass",
    "packed, 2 a pass": "rows of 1,024, both in one pass",
    "packed, 512 a pass": "rows of 1,024, each in passes of at most 512 tokens",
    "padded": "a document a row, all in one pass",
    "padded, 3 a pass": "a document a row, three a pass",
}


def start(python: Path, work: Work, setting: str) -> Started:
    packed = setting.startswith("packed")
    bins = BINS if packed else work.rows_a_step
    each = bins // work.ranks
    passes = {"packed": 1, "packed, 512 a pass": 1, "packed, 2 a pass": each, "padded": each, "padded, 3 a pass": 3}
    command = [
        str(python), str(ROOT / "train.py"), "strategy=ddp", f"launch.ranks={work.ranks}", "log=none", "log.every=1",
        "model=hf", f"model.path={work.model}", "data=jsonl", f"data.path={work.rows}",
        f"run.dir={work.folder / 'run'}",
        f"data.sequence_length={SEQUENCE_LENGTH}", f"data.packing={str(packed).lower()}",
        f"data.train_on={work.train_on}", "precision=fp32",
        f"batch.global_size={bins}", f"batch.micro_size={passes[setting]}", f"max_steps={work.steps}",
        f"optim.lr={LEARNING_RATE}", f"activation.mode={'full' if work.checkpointing else 'none'}",
        "data.eval_fraction=0", "eval.samples=0",
    ]  # fmt: skip
    if setting == "packed, 512 a pass":
        command.append("batch.pass_tokens=512")
    if work.lora:
        command += ["tuning=lora", f"tuning.lora_rank={LORA_RANK}", f"tuning.lora_alpha={LORA_ALPHA}"]
    return Started(command, {"DISTFT_CACHE": str(work.rows.parent / "cache")})
