"""`distft preflight`: everything that can go wrong before a GPU is needed, found in one process on a CPU."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.schema import Run
from distft.errors import UserMistake
from distft.prepared import Prepared

if TYPE_CHECKING:
    from distft.data.batches import Plan
    from distft.data.encode import EncodedSource


def preflight(run: Run, run_dir: Path) -> None:
    """Model folder, data, template, stop token, layout, steps and disk; writes `prepared.json` into the run folder.

    Raises:
        UserMistake: with the knob and the cure.
    """
    from distft.data.strict import refuse_bad_rows

    refuse_bad_rows(run, run_dir)  # before anything below is imported: torch alone takes seconds
    from distft.checkpoint.resume import refuse_early
    from distft.data.batches import Plan
    from distft.data.encode import prepare, settle_template
    from distft.data.sources import texts
    from distft.model.folder import load_tokenizer, resolve
    from distft.objective import make_encoder

    notes: list[str] = []
    model_folder = resolve(run, partial(texts, run))
    tokenizer = load_tokenizer(model_folder, run)
    if run.objective.name == "sft":
        settle_template(tokenizer, run.data.chat_template)
    tokenizer_folder = run_dir / "tokenizer"
    tokenizer.save_pretrained(tokenizer_folder)
    data = prepare(run, tokenizer, tokenizer_folder, run_dir, make_encoder)
    attention, packed = choose_layout(run, model_folder, notes)
    num_ranks = int(os.environ.get("WORLD_SIZE") or (1 if run.launch.ranks == "auto" else run.launch.ranks))
    plan = Plan(data.train, run.batch, run.data.sequence_length, run.seed, packed, data_rank=0, data_size=num_ranks)
    num_steps = plan.num_steps(run.epochs, run.max_steps)
    check_positions(run, model_folder)
    check_disk(run, model_folder, run_dir, num_steps)
    check_compiler(run)
    check_budget(run, model_folder, attention, plan)
    notes.append(describe(data.train, data.eval, num_steps, run, packed))
    prepared = Prepared(
        model_folder=str(model_folder),
        tokenizer_folder=str(tokenizer_folder),
        data_folder=str(data.path),
        data_hash=data.hash,
        packed=packed,
        attention=attention,
        notes=tuple(notes),
    )
    refuse_early(run, run_dir, prepared)
    prepared.write(run_dir)


def choose_layout(run: Run, model_folder: Path, notes: list[str]) -> tuple[str, bool]:
    """Which attention the model gets, and whether documents share a row: only where isolation was seen."""
    from distft.model.attention import choose, isolated

    choice = choose(model_folder, run.model)
    if choice.reason:
        notes.append(choice.reason)
    if run.data.packing is False:
        return choice.implementation, False
    if choice.packs and isolated(model_folder, run.model, choice):
        return choice.implementation, True
    reason = f"{model_folder.name}: documents in one row are not isolated from each other in this model"
    if run.data.packing is True:
        raise UserMistake(f"{reason}; data.packing=true would train on mixtures. Use data.packing=auto or false.")
    notes.append(f"{reason}, so every document gets a row of its own (data.packing=auto)")
    return choice.implementation, False


def check_positions(run: Run, model_folder: Path) -> None:
    """A document can be as long as a bin: the model must know that many positions."""
    config = json.loads((model_folder / "config.json").read_text())
    limit = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(limit, int) and limit < run.data.sequence_length:
        raise UserMistake(
            f"data.sequence_length={run.data.sequence_length} is longer than the model's {limit} positions "
            f"(max_position_embeddings in {model_folder / 'config.json'}); set data.sequence_length={limit} or less."
        )


def check_disk(run: Run, model_folder: Path, run_dir: Path, num_steps: int) -> None:
    """Room for the checkpoints that will lie side by side, one being written, and the final folder."""
    from distft.model.folder import num_parameters

    weights = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    full = run.tuning.method == "full"
    # The fp32 master and AdamW's two moments. Adapters: a tenth of the base is more than they and their moments take.
    copies = 3 if run.optim.name == "adamw" else 1
    checkpoint = 4 * copies * num_parameters(model_folder) if full else weights // 10
    beside = min(run.checkpoint.keep + 1, num_steps // run.checkpoint.every) if run.checkpoint.every else 0
    needed = checkpoint * (1 + beside) + (weights if full else 0)
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise UserMistake(
            f"The run may write {needed / 1e9:.1f} GB ({1 + beside} checkpoints of {checkpoint / 1e9:.1f} GB at once), "
            f"but {run_dir} has {free / 1e9:.1f} GB free. Set run.dir to a larger disk, or lower checkpoint.keep."
        )


def check_compiler(run: Run) -> None:
    """What `model.compile` needs on this machine."""
    if not run.model.compile:
        return
    import torch

    from distft.model.compile import check

    check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_budget(run: Run, model_folder: Path, attention: str, plan: Plan) -> None:
    """Whether `activation.budget` can be met; only on a CPU, since a GPU's kernels are chosen where they run."""
    import torch

    if run.activation.budget is None or torch.cuda.is_available():
        return
    from distft.model import adapters, tuning
    from distft.model.load import blocks, build
    from distft.model.mapping import open_weights
    from distft.objective import budget
    from distft.objective.trainee import Trainee
    from distft.strategy.numbers import numbers_of

    model = build(model_folder, run, attention)
    model, _ = tuning.apply(model, run.tuning, open_weights(model_folder, model), run.seed)
    layers = blocks(model)
    adapters.apply(model, run.model.compile)
    numbers = numbers_of(run.strategy.name, "bf16" if run.precision == "bf16" else "fp32", model)
    budget.choose(Trainee(model), layers, run, plan, torch.device("cpu"), numbers)


def describe(train: list[EncodedSource], held_out: list[EncodedSource], num_steps: int, run: Run, packed: bool) -> str:
    rows, tokens = sum(len(s.lengths) for s in train), sum(int(s.lengths.sum()) for s in train)
    supervised = sum(int(s.supervised.sum()) for s in train)
    layout = "packed" if packed else "one document a row"
    return (
        f"{rows:,} rows, {tokens:,} tokens, {supervised / max(1, tokens):.0%} supervised; "
        f"{sum(len(s.lengths) for s in held_out):,} rows held out; "
        f"{num_steps:,} steps of {run.batch.global_size} bins of {run.data.sequence_length}, {layout}"
    )
