"""Watches a training process from inside, the same way in every environment: Python imports this file at its start
where the folder stands on PYTHONPATH and $OBSERVE names a folder to write to.

Each process that trains writes `<rank>.jsonl`: a line a step (time of day at its end, processor seconds and peak
memory so far), a line a collated batch (real tokens, supervised tokens), a line a logged loss, how many batches make a
step, and, where $OBSERVE_OPERATIONS is set, a line a pass with its floating-point operations. In programs on
transformers' Trainer a callback and a wrapped collator write them; in distft, whose own metrics count the tokens, the
end of `Fit.step` does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def write(**record: Any) -> None:
    rank = os.environ.get("RANK", "0")
    with (Path(os.environ["OBSERVE"]) / f"{rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def peak_memory() -> int:
    """Bytes: the most that this process ever held (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def end_of_step(step: int) -> None:
    write(step=step, time=time.time(), processor=time.process_time(), memory=peak_memory())


def count(features: Sequence[Any], batch: Any) -> dict[str, int]:
    """Tokens that are no padding, and positions whose next token carries loss."""
    tokens = 0
    for feature in features:
        mask = feature.get("attention_mask")
        tokens += len(feature["input_ids"]) if mask is None else sum(1 for mark in mask if mark)
    return {"tokens": tokens, "supervised": int((batch["labels"][:, 1:] != -100).sum())}


def counting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with a line of what it computed behind each call."""
    if "OBSERVE_OPERATIONS" not in os.environ:
        return function

    def counted(*arguments: Any, **named: Any) -> Any:
        from operations import Operations  # beside this file

        with Operations() as so_far:
            answer = function(*arguments, **named)
        write(operations=so_far.total)
        return answer

    return counted


def observe_trainer(module: ModuleType) -> None:
    """A callback and a counting collator in every `transformers.Trainer`."""
    from transformers.trainer_callback import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            end_of_step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in (logs or {}):
                write(logged=state.global_step, loss=float(logs["loss"]))

    original = module.Trainer.__init__

    def watched(trainer: Any, *arguments: Any, **named: Any) -> None:
        original(trainer, *arguments, **named)
        trainer.training_step = counting(trainer.training_step)
        collate = trainer.data_collator

        def counted(features: Sequence[Any]) -> Any:
            batch = collate(features)
            write(**count(features, batch))
            return batch

        trainer.data_collator = counted
        trainer.add_callback(Watch)
        write(batches_per_step=trainer.args.gradient_accumulation_steps)

    module.Trainer.__init__ = watched


def observe_fit(module: ModuleType) -> None:
    """The end of distft's `Fit.step`."""
    original = counting(module.Fit.step)

    def watched(fit: Any, *arguments: Any, **named: Any) -> Any:
        answer = original(fit, *arguments, **named)
        end_of_step(fit.state.step + 1)
        return answer

    module.Fit.step = watched


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function on a module as soon as it has been imported."""

    def __init__(self, watchers: dict[str, Callable[[ModuleType], None]]) -> None:
        self.watchers = watchers

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        watcher = self.watchers.pop(name, None)
        if watcher is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            watcher(module)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


if "OBSERVE" in os.environ:
    sys.meta_path.insert(0, AfterImport({"transformers.trainer": observe_trainer, "distft.loop": observe_fit}))
