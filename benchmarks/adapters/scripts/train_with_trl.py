"""Supervised fine-tuning with TRL's SFTTrainer, as its documentation writes it; the one argument is a JSON file."""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

adapters = None
if given["lora"]:
    from peft import LoraConfig

    adapters = LoraConfig(**given["lora"], task_type="CAUSAL_LM")

rows = load_dataset("json", data_files=given["rows"], split="train")
if given["batches_of"]:
    from grouped import fair_sample

    rows = rows.select(fair_sample(rows["length"], given["batches_of"], given["arguments"]["max_steps"]))
trainer = SFTTrainer(
    model=given["model"],
    args=SFTConfig(**given["arguments"], model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"}),
    train_dataset=rows.select_columns("messages"),
    processing_class=AutoTokenizer.from_pretrained(given["model"]),
    peft_config=adapters,
)
trainer.train()
