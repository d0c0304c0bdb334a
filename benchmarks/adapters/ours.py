"""distft through `python train.py`."""

from __future__ import annotations

from pathlib import Path

from adapters import BINS, LEARNING_RATE, LORA_ALPHA, LORA_RANK, SEQUENCE_LENGTH, Started, Work

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "packed": "rows of 1,024, one a pass",
    "packed, 2 a pass": "rows of 1,024, both in one pass",
    "packed, 512 a pass": "rows of 1,024, each in passes of at most 512 tokens",
    "padded": "a document a row, those of both bins in one pass",
    "padded, 512 a pass": "a document a row, in passes of at most 512 tokens and padding",
    "padded, 1,024 a pass": "a document a row, in passes of at most 1,024 tokens and padding",
}


def start(python: Path, work: Work, setting: str) -> Started:
    layout, _, a_pass = setting.partition(", ")
    micro_size = 1 if layout == "packed" and a_pass != "2 a pass" else BINS // work.ranks
    command = [
        str(python), str(ROOT / "train.py"), "strategy=ddp", f"launch.ranks={work.ranks}", "log=none", "log.every=1",
        "model=hf", f"model.path={work.model}", "data=jsonl", f"data.path={work.rows}",
        f"run.dir={work.folder / 'run'}",
        f"data.sequence_length={SEQUENCE_LENGTH}", f"data.packing={str(layout == 'packed').lower()}",
        f"data.train_on={work.train_on}", "precision=fp32",
        f"batch.global_size={BINS}", f"batch.micro_size={micro_size}", f"max_steps={work.steps}",
        f"optim.lr={LEARNING_RATE}", f"activation.mode={'full' if work.checkpointing else 'none'}",
        "data.eval_fraction=0", "eval.samples=0",
    ]  # fmt: skip
    if a_pass not in ("", "2 a pass"):
        command.append(f"batch.pass_tokens={a_pass.removesuffix(' a pass').replace(',', '')}")
    if work.lora:
        command += ["tuning=lora", f"tuning.lora_rank={LORA_RANK}", f"tuning.lora_alpha={LORA_ALPHA}"]
    return Started(command, {"DISTFT_CACHE": str(work.rows.parent / "cache")})
