"""The processes of a run: their command lines, and their start. watch.py waits for them."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from distft.launch.topology import environment_of, free_port

Process = subprocess.Popen[bytes]

STATUS_FOLDER = "DISTFT_STATUS"  # where ranks under another launcher leave their process id and exit code
STEP = "step"  # and under srun the step of Slurm that they are


@dataclass(frozen=True)
class Command:
    """One process to start: its arguments and what is added to the environment."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def also(self, environment: dict[str, str]) -> Command:
        return dataclasses.replace(self, environment={**self.environment, **environment})

    def __str__(self) -> str:
        """In the form that a shell takes."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.argv)])


def quoted(text: str) -> str:
    """Text as a value in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def package_path() -> dict[str, str]:
    """What children need to import this very distft, also when it is run from a checkout that is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "")
    if "site-packages" in root or root in paths.split(os.pathsep):
        return {}
    return {"PYTHONPATH": os.pathsep.join([root, paths]) if paths else root}


def verb_command(*words: str) -> Command:
    """`distft …` in a process of its own."""
    return Command([sys.executable, "-m", "distft", *words], package_path())


def rank_words(snapshot: Path, resume: str | None) -> list[str]:
    """What every rank is told, after `distft`."""
    return ["train", f"--snapshot={snapshot}", "--prepared", *([f"--resume={resume}"] if resume else [])]


def worker_commands(engine: str, size: int, snapshot: Path, resume: str | None) -> list[Command]:
    """The processes of one run: a command for each rank, or the one of a foreign launcher that starts them.

    `resume`: a checkpoint or run folder that is not written in the snapshot.
    """
    port = free_port()
    words = rank_words(snapshot, resume)
    if engine == "direct":
        return [
            Command([sys.executable, "-m", "distft", *words], {**package_path(), **environment_of(rank, size, port)})
            for rank in range(size)
        ]
    settings = environment_of(0, size, port)
    shared = {name: value for name, value in settings.items() if name.startswith(("OMP_", "GLOO_"))}
    if engine == "deepspeed":
        launcher = ["-m", "deepspeed.launcher.runner", f"--num_gpus={size}", f"--master_port={port}", "--no_local_rank"]
        launcher += ["--module", "distft"]
    else:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--master-addr=127.0.0.1"]
        launcher += [f"--master-port={port}", "-m", "distft"]
    return [Command([sys.executable, *launcher, *words], {**package_path(), **shared})]


def start(commands: list[Command], logs: Path, quiet: bool, environment: dict[str, str]) -> list[Process]:
    """Start the processes. Rank 0 has the terminal; with `quiet` the others write into logs/rank-N.log alone.

    Each process leads a group of its own, so that a terminal's Ctrl-C reaches the controller alone, which passes it
    on once.
    """
    processes = []
    with ExitStack() as files:
        for rank, command in enumerate(commands):
            output = files.enter_context((logs / f"rank-{rank}.log").open("ab")) if quiet and rank > 0 else None
            processes.append(
                subprocess.Popen(
                    command.argv,
                    env={**os.environ, **command.environment, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    process_group=0,
                )
            )
    return processes
