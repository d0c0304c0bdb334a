"""Time forward and backward of one Llama block: fused LoRA layers, PEFT's own, and full tuning.

    python benchmarks/lora.py [--toy] [--repeats 15] [--threads 2] [--out benchmarks/results/lora.json]

LoRA r=16 on all linear layers, fp32, one row of 1,024 tokens, attention by torch's SDPA. The variants take turns within
each repeat, so that other work on the machine falls on all of them; the table shows medians of the time and of the
processor time of all threads, which other work disturbs less. Kept: bytes of the tensors that the forward pass keeps
for the backward pass, parameters left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = {384: 1024, 1024: 2816}  # hidden -> intermediate
TOY_SIZES = {64: 128}


def variants(hidden: int, intermediate: int) -> dict[str, Any]:
    """The same model of one block three times, ready for a pass."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from distft.model import adapters
    from distft.model.plain import quiet

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=hidden // 64 or 1,
        attn_implementation="sdpa",
        use_cache=False,
    )
    full = LlamaForCausalLM(config)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with quiet():
        peft = get_peft_model(copy.deepcopy(full), lora)
    fused = copy.deepcopy(peft)
    notes = adapters.apply(fused)
    assert not notes, notes
    return {"full": full.train(), "peft": peft.train(), "fused": fused.train()}


def once(model: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """A pass through the block (the head left out) and back. x requires a gradient, as behind another block."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    output: Tensor = base.model(inputs_embeds=x).last_hidden_state
    output.backward(gradient)
    return output


def kept_bytes(model: Any, x: Tensor, gradient: Tensor) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        once(model, x, gradient)
    return sum(each.untyped_storage().nbytes() for address, each in found.items() if address not in own)


def measured(hidden: int, intermediate: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    models = variants(hidden, intermediate)
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    gradient = torch.randn(1, tokens, hidden)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):  # two to warm up
        for name, model in models.items():
            start, start_processor = time.perf_counter(), time.process_time()
            once(model, x, gradient)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
            model.zero_grad()
            x.grad = None
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    busy = {name: statistics.median(values) for name, values in processor.items()}
    return [
        {
            "hidden": hidden,
            "tokens": tokens,
            "variant": name,
            "milliseconds": 1000 * medians[name],
            "quartiles": [1000 * value for value in statistics.quantiles(seconds[name], n=4)[::2]],
            "times_peft": medians[name] / medians["peft"],
            "processor_milliseconds": 1000 * busy[name],
            "processor_times_peft": busy[name] / busy["peft"],
            "kept_megabytes": kept_bytes(model, x, gradient) / 1e6,
        }
        for name, model in models.items()
    ]


def table(rows: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    say(
        f"{'hidden':>6} {'tokens':>6} {'variant':>7} {'ms':>8} {'quartiles':>17} {'x PEFT':>7} {'cpu ms':>8} "
        f"{'x PEFT':>7} {'kept MB':>8}"
    )
    for row in rows:
        low, high = row["quartiles"]
        say(
            f"{row['hidden']:>6} {row['tokens']:>6} {row['variant']:>7} {row['milliseconds']:>8.1f} "
            f"{low:>8.1f}-{high:<8.1f} {row['times_peft']:>7.2f} {row['processor_milliseconds']:>8.1f} "
            f"{row['processor_times_peft']:>7.2f} {row['kept_megabytes']:>8.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="one small size, to see that it works")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes, tokens = (TOY_SIZES, 64) if arguments.toy else (SIZES, 1024)
    rows = [row for size in sizes.items() for row in measured(*size, tokens, arguments.repeats)]
    table(rows, print)
    if arguments.out is not None:
        found = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, torch "
            f"{torch.__version__}",
            "load_average": os.getloadavg(),
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
