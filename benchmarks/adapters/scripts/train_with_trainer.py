"""Supervised fine-tuning with transformers' Trainer as its documentation writes it; the one argument is a JSON file."""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(given["model"])
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype="float32", attn_implementation="sdpa")
if given["lora"]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(**given["lora"], task_type="CAUSAL_LM"))


def encode(row):
    told = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = told["input_ids"][: given["longest"]], told["assistant_masks"][: given["longest"]]
    trained = [given["train_on"] == "all" or bool(mark) for mark in mask]
    labels = [token if keep else -100 for token, keep in zip(ids, trained, strict=True)]
    return {"input_ids": ids, "labels": labels}


rows = load_dataset("json", data_files=given["rows"], split="train").map(encode, remove_columns="messages")
if given["batches_of"]:
    from grouped import fair_sample

    rows = rows.select(fair_sample(rows["length"], given["batches_of"], given["arguments"]["max_steps"]))
trainer = Trainer(
    model=model,
    args=TrainingArguments(**given["arguments"]),
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
)
trainer.train()
