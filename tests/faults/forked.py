"""Ranks that start in a fraction of a second: forked from a process that has imported everything, then `distft train`.

They find RANK, WORLD_SIZE and a port in their environment, as torchrun leaves them, and are processes like any other.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.launch.topology import free_port
from tests.faults.runs import PATIENCE

KILLING = Path(__file__).with_name("killing")


def be_a_rank(words: list[str], environment: dict[str, str], output: Path, before: Callable[[], object] | None) -> None:
    """The process: its output into a file, its exit code that of `distft train`."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["train.py", *words]
    if "KILL_AT" in environment:
        spec = importlib.util.spec_from_file_location("killing", KILLING / "sitecustomize.py")
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if before is not None:
        before()
    from distft.cli import main

    code = main(["train", *words])
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Ranks:
    """The processes of one run and where they write."""

    processes: list[Any]
    output: Path

    def end(self, seconds: float = PATIENCE) -> tuple[list[int], str]:
        """Wait for all of them. Returns their exit codes and what they printed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        text = self.output.read_text()
        assert not late, text
        return [process.exitcode for process in self.processes], text


def start(
    words: list[str], num_ranks: int, output: Path, before: Callable[[], object] | None = None, **environment: str
) -> Ranks:
    """`words`: the command line after `train.py`. `before`: what each process calls first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    output.unlink(missing_ok=True)
    processes = []
    fixed = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1",
             "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    for rank in range(num_ranks):
        own = {**fixed, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
        process = context.Process(target=be_a_rank, args=(words, own, output, before), daemon=True)
        process.start()
        processes.append(process)
    return Ranks(processes, output)
