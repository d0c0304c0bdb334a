"""How each rank's process and device fare: published by a thread of every rank, gathered by rank 0's tracker.

Nothing of it touches training: a rank writes a small file under logs/system/ every few seconds, and the thread of the
tracker reads those of all ranks when it has a training record to send.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from distft.world import World

FIRST_SECONDS, SAMPLE_SECONDS = 0.5, 10.0  # until the first sample, and between others
MOST_RANKS = 64  # that get curves of their own; of more ranks the spread is shown


def sample_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / "system" / f"rank-{rank}.json"


class Sampler:
    """This rank's own thread. It ends with the process, or by `stop`."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path, self.device = sample_file(run_dir, world.rank), world.device
        self.number = 0
        self.process = psutil.Process()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.work, name="system metrics", daemon=True)
        self.thread.start()

    def work(self) -> None:
        self.process.cpu_percent()  # the first answer of each says nothing
        psutil.cpu_percent()
        wait = FIRST_SECONDS
        while not self.left.wait(wait):
            self.publish()
            wait = SAMPLE_SECONDS

    def publish(self) -> None:
        """At once or not at all. A run folder that is out of reach ends no run."""
        self.number += 1
        staged = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError, psutil.Error):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps({"number": self.number, "values": self.sample()}), encoding="utf-8")
            staged.replace(self.path)

    def sample(self) -> dict[str, float]:
        """Of this process: percent of a core, bytes. Of its host: percent. Of its GPU: bytes, percent, °C, watts."""
        values = {
            "cpu_percent": self.process.cpu_percent(),
            "memory_bytes": float(self.process.memory_info().rss),
            "host_cpu_percent": psutil.cpu_percent(),
            "host_memory_percent": psutil.virtual_memory().percent,
        }
        return values | (self.of_gpu() if getattr(self.device, "type", "cpu") == "cuda" else {})

    def of_gpu(self) -> dict[str, float]:
        import torch

        values = {"gpu_memory_bytes": float(torch.cuda.memory_allocated(self.device))}
        with contextlib.suppress(ImportError, RuntimeError):  # without nvidia-ml-py, or on a GPU that does not tell
            values["gpu_percent"] = float(torch.cuda.utilization(self.device))
            values["gpu_celsius"] = float(torch.cuda.temperature(self.device))
            values["gpu_watts"] = torch.cuda.power_draw(self.device) / 1000
        return values

    def stop(self) -> None:
        self.left.set()
        self.thread.join(1)


class Gathering:
    """What all ranks have published since it was last asked."""

    def __init__(self, run_dir: Path, size: int) -> None:
        self.run_dir, self.size = run_dir, size
        self.seen: dict[int, Any] = {}

    def fresh(self) -> dict[str, float]:
        """`system/rank-3/cpu_percent` and the like of every rank that has something new."""
        found = {}
        for rank in range(self.size):
            try:
                sample = json.loads(sample_file(self.run_dir, rank).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if self.seen.get(rank) != sample:
                self.seen[rank] = sample
                found[rank] = sample["values"]
        return named(found) if self.size <= MOST_RANKS else spread(found)


def named(samples: dict[int, dict[str, float]]) -> dict[str, float]:
    return {f"system/rank-{rank}/{name}": value for rank, values in samples.items() for name, value in values.items()}


def spread(samples: dict[int, dict[str, float]]) -> dict[str, float]:
    """Least, median and most over the ranks."""
    found = {}
    for name in sorted({name for values in samples.values() for name in values}):
        values = [sample[name] for sample in samples.values() if name in sample]
        for word, value in (("min", min(values)), ("median", statistics.median(values)), ("max", max(values))):
            found[f"system/{name}/{word}"] = value
    return found
