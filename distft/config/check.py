"""The rules between knobs. All problems of a run are found at once, each named with its cure.

A setting that would be ignored is a problem too: whoever gave it believes that it does something.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distft.config.data_rules import data, files, looks_local, sources
from distft.config.given import all_knobs, ignored, is_default, value_of
from distft.config.launch_rules import launching
from distft.config.ranges import AUTO, RANGES
from distft.config.redact import redact
from distft.config.resuming import HASHED
from distft.config.schema import Run, Source
from distft.config.schema.launch import ALERTS
from distft.config.schema.strategy import FSDP, ZERO
from distft.config.slurm_rules import slurm
from distft.config.words import knobs, nearest, sections, unlisted


def check(run: Run) -> list[str]:
    """Every problem of a run that shows without reading its data or its model."""
    rules: tuple[Callable[[Run], Iterator[str]], ...] = (
        words,
        ranges,
        model,
        data,
        sources,
        files,
        compiling,
        tuning,
        objective,
        strategy,
        optim,
        batch,
        evaluation,
        length,
        guard,
        tracking,
        resuming,
        launching,
        slurm,
    )
    hidden = list(secrets(run))  # alone: what else is wrong would repeat the value
    return hidden or [problem for rule in rules for problem in rule(run)]


def settle(run: Run) -> Run:
    """The same run with no `auto` left that the configuration alone decides, and with local paths made absolute."""
    run = with_absolute_paths(run)
    too_long = run.data.too_long
    if too_long == "auto":
        too_long = "split" if run.objective.name == "lm" else "truncate"
    return dataclasses.replace(run, data=dataclasses.replace(run.data, too_long=too_long))


def with_absolute_paths(run: Run) -> Run:
    """The same run with local paths made absolute, so that it can be repeated from anywhere."""
    names = ("path", "eval_path", "exclude_ids", "chat_template", "cache_dir")
    data = dataclasses.replace(
        run.data,
        **{name: absolute(getattr(run.data, name)) for name in names},
        sources=[
            dataclasses.replace(source, path=absolute(source.path), exclude_ids=absolute(source.exclude_ids))
            for source in run.data.sources
        ],
    )
    return dataclasses.replace(run, data=data, model=dataclasses.replace(run.model, path=absolute(run.model.path)))


def absolute(path: Any) -> Any:
    """A path, or a pattern of paths, that exists here, made absolute; hub ids and words stay as they are."""
    if not isinstance(path, str):
        return path
    full = Path(path).expanduser()
    if not (path.startswith("~") or full.exists() or glob.glob(path)):
        return path
    return str(full.absolute())


def words(run: Run) -> Iterator[str]:
    """Words outside a closed set."""
    settings = [(knob.name, knob, value_of(run, knob.name)) for knob in all_knobs().values()]
    for index, source in enumerate(run.data.sources):
        settings += [(f"data.sources[{index}].{knob.name}", knob, getattr(source, knob.name)) for knob in knobs(Source)]
    for name, knob, value in settings:
        if not knob.choices or any(type(value) is type(choice) and value == choice for choice in knob.choices):
            continue
        options = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in knob.choices]
        near = nearest(str(value), options)
        meant = f"Did you mean {near}? " if near else ""
        yield f"{name}={value}: no such choice. {meant}Choices: {', '.join(options)}."


def ranges(run: Run) -> Iterator[str]:
    """Numbers outside their range, and what is not a number where one belongs."""
    for name, (fits, wanted) in RANGES.items():
        value = value_of(run, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None and None in (all_knobs()[name].default,):
            continue
        if value == "auto" and (all_knobs()[name].default == "auto" or name in AUTO):
            continue
        if not is_number or not math.isfinite(value) or not fits(value):
            yield f"{name}={value}: {wanted} is wanted."
    betas = run.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={list(betas)}: two numbers from 0 to below 1 are wanted, such as [0.9,0.999]."


def model(run: Run) -> Iterator[str]:
    shape = [name for name in all_knobs() if name.startswith("model.tiny.")]
    if run.model.name == "hf":
        if not run.model.path:
            yield "model=hf needs model.path: the folder of a model, or a hub id such as model.path=Qwen/Qwen3-0.6B."
        elif looks_local(run.model.path):
            if not Path(run.model.path).expanduser().is_dir():
                yield f"model.path={run.model.path}: there is no such folder. Give the folder that holds config.json."
            yield from ignored(run, ["model.revision"], "with a model in a local folder")
        yield from ignored(run, shape, "with model=hf")
    elif run.model.name == "tiny":
        for name in ("path", "revision", "trust_remote_code"):
            yield from ignored(run, [f"model.{name}"], "with model=tiny", "Add model=hf to read a model")
        tiny = run.model.tiny
        if tiny.num_heads > 0 and tiny.hidden_size % (2 * tiny.num_heads):
            yield (
                f"model.tiny.hidden_size={tiny.hidden_size} is not an even multiple of model.tiny.num_heads="
                f"{tiny.num_heads}: a head's size must be even. Set model.tiny.hidden_size={32 * tiny.num_heads}."
            )
        if tiny.num_kv_heads > 0 and tiny.num_heads % tiny.num_kv_heads:
            yield (
                f"model.tiny.num_heads={tiny.num_heads} is not a multiple of model.tiny.num_kv_heads="
                f"{tiny.num_kv_heads}. Set model.tiny.num_kv_heads={tiny.num_heads}."
            )


def compiling(run: Run) -> Iterator[str]:
    if not run.model.compile:
        return
    if run.strategy.name in ("zero3", "zero3_offload"):
        yield (
            f"model.compile=true has no effect with strategy={run.strategy.name}, whose hooks gather weights inside "
            "the blocks and cut every graph. Set strategy=fsdp or zero2, or leave model.compile at false."
        )
    if run.model.kernels == "liger":
        yield (
            "model.kernels=liger has no effect with model.compile=true, which writes kernels of its own. Set "
            "model.kernels=auto, or leave model.compile at false."
        )
    if run.activation.mode == "selective":
        yield (
            "activation.mode=selective chooses among operators, which model.compile=true fuses. Set activation.mode="
            "full or none, or leave model.compile at false."
        )


def tuning(run: Run) -> Iterator[str]:
    if run.tuning.method == "full":
        names = [name for name in all_knobs() if name.startswith("tuning.") and name != "tuning.method"]
        yield from ignored(run, names, "with tuning=full", "Add tuning=lora to train adapters")
    target = run.tuning.target
    if not (isinstance(target, str) and target) and not (
        isinstance(target, list) and target and all(isinstance(part, str) for part in target)
    ):
        yield (
            f"tuning.target={target}: all-linear, a list of module names [q_proj,v_proj] or a regular expression is "
            "wanted."
        )


def objective(run: Run) -> Iterator[str]:
    if run.objective.name == "lm":
        yield from ignored(run, ["data.train_on", "data.multi_turn"], "with objective=lm, which trains every token")


def strategy(run: Run) -> Iterator[str]:
    name = run.strategy.name
    if name not in ZERO:
        yield from ignored(run, ["strategy.deepspeed"], f"with strategy={name} (DeepSpeed runs {', '.join(ZERO)})")
    elif run.strategy.deepspeed:
        from distft.config.deepspeed import problems

        yield from problems(run)
    if name not in FSDP:
        names = ["strategy.reshard_after_forward", "strategy.gradient_sync"]
        yield from ignored(run, names, f"with strategy={name} (FSDP2 alone reads it: {', '.join(FSDP)})")
    drops = run.strategy.reshard_after_forward
    if drops != "auto" and not isinstance(drops, bool) and not (isinstance(drops, int) and drops >= 2):
        yield f"strategy.reshard_after_forward={drops}: auto, true, false or a number of ranks from 2 is wanted."
    if name == "hsdp" and run.strategy.communication != "fp32":
        yield (
            "strategy.communication=bf16 has no effect on the sums between hsdp's copies. Use strategy=fsdp, or leave "
            "it at fp32."
        )
    size = run.strategy.shard_size
    if name != "hsdp":
        yield from ignored(run, ["strategy.shard_size"], f"with strategy={name} (only hsdp has shard groups)")
    elif size != "auto" and not (isinstance(size, int) and not isinstance(size, bool) and size >= 1):
        yield f"strategy.shard_size={size}: auto or a number of ranks from 1 is wanted."
    elif isinstance(size, int) and isinstance(run.launch.ranks, int) and run.launch.ranks % size:
        yield (
            f"strategy.shard_size={size} does not divide launch.ranks={run.launch.ranks}: every copy of the model "
            "needs the same number of ranks."
        )


def optim(run: Run) -> Iterator[str]:
    if run.optim.name == "sgd":
        yield from ignored(run, ["optim.betas", "optim.eps"], "with optim=sgd, which has no moments")
    schedule = run.schedule
    if schedule.name == "constant":
        yield from ignored(run, ["schedule.final"], "with schedule=constant, which does not fall")
    if schedule.name != "wsd":
        yield from ignored(run, ["schedule.decay"], f"with schedule={schedule.name} (only wsd has a decay phase)")
    elif 0 < schedule.warmup < 1 < schedule.warmup + schedule.decay:
        yield (
            f"schedule.warmup={schedule.warmup} and schedule.decay={schedule.decay} are shares of the run and add up "
            "to more than 1. Lower one of them."
        )
    if schedule.warmup > 1 and schedule.warmup != int(schedule.warmup):
        yield f"schedule.warmup={schedule.warmup}: a share below 1 or a whole number of steps is wanted."
    if run.max_steps is not None and schedule.warmup > 1 and schedule.warmup >= run.max_steps:
        yield (
            f"schedule.warmup={schedule.warmup:g} steps is as long as the run (max_steps={run.max_steps}): the peak "
            "rate would never be used. Lower schedule.warmup."
        )


def batch(run: Run) -> Iterator[str]:
    if run.batch.micro_size > run.batch.global_size:
        yield (
            f"batch.micro_size={run.batch.micro_size} is larger than batch.global_size={run.batch.global_size}: a step "
            "has no more bins than that. Lower batch.micro_size or raise batch.global_size."
        )


def evaluation(run: Run) -> Iterator[str]:
    has_rows = run.data.eval_path is not None or run.data.eval_fraction > 0
    if not has_rows:
        cure = "Set data.eval_path, or data.eval_fraction above 0."
        if run.eval.every > 0:
            yield f"eval.every={run.eval.every}, but there are no rows to evaluate on. {cure}"
        if run.early_stopping.patience > 0:
            yield f"early_stopping.patience={run.early_stopping.patience}, but there are no rows to evaluate on. {cure}"
    if has_rows and run.early_stopping.patience > 0 and run.eval.every == 0:
        yield (
            f"early_stopping.patience={run.early_stopping.patience} counts evaluations, but eval.every=0 evaluates "
            "only at the end. Set eval.every to a number of steps."
        )
    best = run.checkpoint.best
    if not best.startswith("eval/"):
        yield f"checkpoint.best={best}: a metric of an evaluation is wanted, such as eval/loss."
    elif best == "eval/loss" and run.checkpoint.mode == "max":
        yield "checkpoint.mode=max would call the worst loss the best. Set checkpoint.mode=min for eval/loss."
    if run.eval.samples == 0:
        yield from ignored(run, ["eval.max_new_tokens"], "with eval.samples=0: no answer is sampled")


def length(run: Run) -> Iterator[str]:
    if run.max_steps is not None and not is_default(run, "epochs"):
        yield f"epochs={run.epochs} has no effect with max_steps={run.max_steps}. Drop one of the two."


def guard(run: Run) -> Iterator[str]:
    spike, window = run.guard.spike, run.guard.spike_window
    if spike == "none":
        names = ["guard.spike_score", "guard.spike_window"]
        yield from ignored(run, names, "with guard.spike=none", "Set guard.spike=warn, skip or rollback")
    elif run.max_steps is not None and run.max_steps <= window:
        yield (
            f"guard.spike={spike} would judge no step: guard.spike_window={window} is as long as the run (max_steps="
            f"{run.max_steps}). Lower guard.spike_window, or leave guard.spike at none."
        )
    if spike != "rollback":
        yield from ignored(run, ["guard.max_rollbacks"], f"with guard.spike={spike} (only rollback goes back)")
    elif run.checkpoint.every == 0:
        yield (
            "guard.spike=rollback goes back to the last checkpoint, but checkpoint.every=0 saves none before the end. "
            "Set checkpoint.every to a number of steps."
        )


def tracking(run: Run) -> Iterator[str]:
    if run.log.tracker != "wandb":
        names = ["log.project", "log.group", "log.tags", "log.alerts"]
        yield from ignored(run, names, f"with log={run.log.tracker} (log=wandb has them)")
    yield from unlisted("log.alerts", run.log.alerts, ALERTS, "is no alert")


def secrets(run: Run) -> Iterator[str]:
    """What must not be written down, since every knob is: in the snapshot, in the tracker, in checkpoints."""
    for name in all_knobs():
        value = value_of(run, name)
        plain = [dataclasses.asdict(source) for source in value] if name == "data.sources" else value
        if redact(str(plain)) != str(plain):
            yield (
                f"{name} holds what looks like a password, a token or a key, and every knob is written into the run "
                "folder. Leave it out: HF_TOKEN, WANDB_API_KEY and the like are read from the environment."
            )


def resuming(run: Run) -> Iterator[str]:
    for name in run.resume_allow:
        known = [*all_knobs(), *sections(Run), *HASHED]
        if name not in known:
            near = nearest(name, known)
            yield f"resume_allow: {name} is no knob." + (f" Did you mean {near}?" if near else "")
    if run.resume == "never" and run.resume_allow:
        yield "resume_allow has no effect with resume=never. Drop one of the two."
    if run.resume not in ("auto", "never") and not Path(run.resume).expanduser().exists():
        near = nearest(run.resume, ["auto", "never"])
        yield f"resume={run.resume}: there is no such run folder or checkpoint. " + (
            f"Did you mean resume={near}?" if near else "resume=auto looks in run.dir."
        )
    for name in ("run.dir", "resume"):
        text = str(value_of(run, name) or "")
        if not text.isprintable():
            yield f"{name}={text!r}: a path with line breaks or control characters is refused. Name another folder."
    if run.run.name is not None and not re.fullmatch(r"[\w.+=@-]+", run.run.name):
        yield f"run.name={run.run.name}: it names a folder, so letters, digits and . _ - + = @ are wanted."
