"""One training of one program: started through its real entry, watched, and told as numbers."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters import Started, Work

HERE = Path(__file__).resolve().parent
MODULES = {
    "distft": "adapters.ours",
    "TRL": "adapters.with_trl",
    "LLaMA-Factory": "adapters.with_llamafactory",
    "Trainer": "adapters.with_trainer",
}
LONGEST_RUN = 1800  # seconds


@dataclass(frozen=True)
class Measured:
    """One run. Rates are over the steps after the warm-up, memory and start over the whole run."""

    tokens_per_second: float
    supervised_per_second: float
    seconds_per_step: float  # from the end of a step to the end of the next
    processor_per_step: float  # seconds of all threads of rank 0
    tokens_per_step: float
    supervised_per_step: float
    memory: int  # bytes; the largest process of the run, from its start to its end
    memory_training: int  # bytes; the same up to the end of the last step, rank 0
    start: float  # seconds from the start of the process to the end of its first step
    losses: list[float]  # as the program logs them: all of them start near the logarithm of the vocabulary
    operations: float | None = None  # of all ranks for a supervised token; None: not counted, which takes its time


def settings_of(name: str) -> dict[str, str]:
    """The settings of a program, with what they mean."""
    return dict(importlib.import_module(MODULES[name]).SETTINGS)


def run(
    name: str, setting: str, python: Path, work: Work, threads: int, warm_up: int, operations: bool = False
) -> Measured:
    """Train once in an empty temporary folder, which is removed. `operations`: count them, in place of the time.

    Raises:
        RuntimeError: the program failed; its last lines are in the message.
    """
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        work = replace(work, folder=folder)
        started: Started = importlib.import_module(MODULES[name]).start(python, work, setting)
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment = {  # without bytecode a program would compile all it imports at every start
            **inherited,
            **started.environment,
            "OMP_NUM_THREADS": str(max(1, threads // work.ranks)),
            "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(work.rows.parent / "datasets" / name),
            "OBSERVE": str(folder),
            **({"OBSERVE_OPERATIONS": "yes"} if operations else {}),
            "PYTHONPATH": str(HERE / "adapters" / "observer"),
        }
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            began = time.time()
            process = subprocess.Popen(
                started.command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                status, memory = wait(process)
            except KeyboardInterrupt:
                process.kill()
                os.wait4(process.pid, 0)
                raise
        if status != 0:
            last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            command = " ".join(started.command)
            raise RuntimeError("\n".join([f"{name} ({setting}) ended with {status}: {command}", *last]))
        return told(folder, name, work.ranks, began, memory, warm_up)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Exit status, and the peak memory of its largest process in bytes (Linux counts what it waited for itself)."""
    deadline = time.monotonic() + LONGEST_RUN
    while True:
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss * 1024
        if time.monotonic() > deadline:
            process.kill()
            os.wait4(process.pid, 0)
            raise RuntimeError(f"no end after {LONGEST_RUN} s: {process.args!r}")
        time.sleep(0.1)


def told(folder: Path, name: str, ranks: int, began: float, memory: int, warm_up: int) -> Measured:
    """The numbers of what the observer and, for distft, its own metrics wrote."""
    records = [read_lines(folder / f"{rank}.jsonl") for rank in range(ranks)]
    ends = {record["step"]: record for record in records[0] if "step" in record}
    steps, last = len(ends), len(ends)
    assert sorted(ends) == list(range(1, steps + 1)), f"{name} wrote steps {sorted(ends)}"
    if name == "distft":
        metrics = [line for line in read_lines(folder / "run" / "metrics.jsonl") if line["split"] == "train"]
        tokens = [line["tokens"] for line in metrics]
        supervised = [line["supervised_tokens"] for line in metrics]
        losses = [line["loss"] for line in metrics]
    else:
        counted = [by_step(rank, steps) for rank in records]
        tokens = [sum(parts) for parts in zip(*(rank[0] for rank in counted), strict=True)]
        supervised = [sum(parts) for parts in zip(*(rank[1] for rank in counted), strict=True)]
        losses = [record["loss"] for record in records[0] if "loss" in record]
    seconds = ends[last]["time"] - ends[warm_up]["time"]
    count = last - warm_up
    counted_operations = sum(record["operations"] for rank in records for record in rank if "operations" in record)
    return Measured(
        tokens_per_second=sum(tokens[warm_up:]) / seconds,
        supervised_per_second=sum(supervised[warm_up:]) / seconds,
        seconds_per_step=seconds / count,
        processor_per_step=(ends[last]["processor"] - ends[warm_up]["processor"]) / count,
        tokens_per_step=sum(tokens[warm_up:]) / count,
        supervised_per_step=sum(supervised[warm_up:]) / count,
        memory=memory,
        memory_training=ends[last]["memory"],
        start=ends[1]["time"] - began,
        losses=losses,
        operations=counted_operations / sum(supervised) if counted_operations else None,
    )


def by_step(records: list[dict[str, Any]], steps: int) -> tuple[list[int], list[int]]:
    """Tokens and supervised tokens of each step on one rank. A loader may have collated a batch more than was used."""
    each = next(record["batches_per_step"] for record in records if "batches_per_step" in record)
    batches = [record for record in records if "tokens" in record][: each * steps]
    parts = [batches[index * each : (index + 1) * each] for index in range(steps)]
    return [sum(b["tokens"] for b in part) for part in parts], [sum(b["supervised"] for b in part) for part in parts]


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
