"""The run folder: where a run lies, and what is written into it before anything starts."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from distft import pulse
from distft.config.load import write_snapshot
from distft.config.redact import redact
from distft.config.schema import Run
from distft.errors import UserMistake
from distft.launch import failure, lock

PACKAGES = """
    distft torch transformers deepspeed peft datasets tokenizers hydra-core omegaconf wandb numpy pyarrow safetensors
    flash-attn liger-kernel bitsandbytes
"""
VARIABLES = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "SLURM_JOB_", "SLURM_NNODES", "TORCH_", "HF_HUB_OFFLINE", "DISTFT_")


def run_folder_of(path: Path) -> Path:
    """The run folder that a run folder or a checkpoint in it belongs to.

    Raises:
        UserMistake: it is neither.
    """
    for folder in (path, path.parent.parent if path.parent.name == "checkpoints" else path):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserMistake(
        f"resume={path} is neither a run folder (with config.yaml) nor a checkpoint in one "
        "(<run>/checkpoints/step-000100)."
    )


def place_run(run: Run) -> tuple[Path | None, Run]:
    """Where the run goes if that is settled (None: a new folder below runs/), and the run with `resume` made absolute.

    Raises:
        UserMistake: `run.dir` holds something that this run may not go on with.
    """
    if run.resume not in ("auto", "never"):
        source = Path(run.resume).expanduser().absolute()
        run = dataclasses.replace(run, resume=str(source))
        if run.run.dir is None:
            return run_folder_of(source), run
    if run.run.dir is None:
        return requeued_folder(run), run
    folder = Path(run.run.dir).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise UserMistake(f"run.dir={run.run.dir} is a file. Name a folder.")
    if folder.is_dir() and any(not goes_before(path.name) for path in folder.iterdir()):
        if not (folder / "config.yaml").is_file():
            raise UserMistake(f"run.dir={run.run.dir} holds files and is no run folder. Name a new or an empty one.")
        if run.resume == "never":
            raise UserMistake(
                f"run.dir={run.run.dir} holds a run already, and resume=never would mix two. Name another folder, or "
                "go on with it: resume=auto."
            )
    return folder, run


def goes_before(name: str) -> bool:
    """What may lie in a folder before its run begins: a lock, and the logs of whatever starts it."""
    return name == "logs" or name.startswith(lock.LOCK)


def requeued_folder(run: Run) -> Path | None:
    """The folder that this Slurm job had before it was requeued (its id is part of the name); None elsewhere."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SLURM_RESTART_COUNT", "0") == "0" or run.resume != "auto":
        return None
    folders = Path("runs").absolute().glob(f"{run.run.name or run.data.name}-????????-??????-{job}")
    return max((folder for folder in folders if (folder / "config.yaml").is_file()), default=None)


def make_folder(run: Run, command: Sequence[str], folder: Path | None, job_id: str | None = None) -> Path:
    """Make the run folder, hold it, and write what repeats and explains the run. Returns its absolute path.

    Raises:
        UserMistake: it cannot be made, or another launch holds it (see lock.py).
    """
    path = folder or new_folder(run, job_id)
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        pulse.forget(path)
    except OSError as error:
        raise UserMistake(f"run.dir={path} cannot be made: {error.strerror}. Name one that you may write.") from None
    lock.take(path)
    config = path / "config.yaml"
    if config.exists():  # a run that goes on: what it was started with stays beside
        moment = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(config.stat().st_mtime))
        config.replace(path / f"config-{moment}.yaml")
    # Whoever repeats a run wants it from the start, not from where this one goes on in its own folder.
    inside = run.resume not in ("auto", "never") and Path(run.resume).is_relative_to(path)
    write_snapshot(dataclasses.replace(run, resume="auto") if inside else run, config)
    with (path / "command.txt").open("a", encoding="utf-8") as lines:
        lines.write(redact(shlex.join(command)) + "\n")
    (path / "environment.txt").write_text(redact(environment_text()), encoding="utf-8")
    return path


def forget(run_dir: Path) -> None:
    """What ranks of an earlier start have left to be looked at while a run runs; and tell where this one does."""
    pulse.forget(run_dir)
    failure.forget(run_dir)
    (run_dir / "environment.txt").write_text(redact(environment_text()), encoding="utf-8")


def new_folder(run: Run, job_id: str | None = None) -> Path:
    """A folder runs/<name>-<time>(-<job id>) that nobody else has, also not one who asked in the same second."""
    stem = f"{run.run.name or run.data.name}-{time.strftime('%Y%m%d-%H%M%S')}" + (f"-{job_id}" if job_id else "")
    for number in range(1, 10_000):
        path = Path("runs").absolute() / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserMistake(f"{path} cannot be made: {error.strerror}. Set run.dir to one you may write.") from None
    raise UserMistake(f"runs/{stem} exists ten thousand times. Set run.name.")


def environment_text() -> str:
    """Versions, machine and the variables that matter, a line each; no secrets."""
    lines = [
        f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"host: {socket.gethostname()}",
        f"platform: {platform.platform()}",
        f"python: {platform.python_version()} ({sys.executable})",
        f"cores: {len(os.sched_getaffinity(0))}",
        f"folder: {Path.cwd()}",
        f"commit: {commit() or 'unknown'}",
    ]
    for name in PACKAGES.split():
        try:
            lines.append(f"{name}: {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    lines += [f"gpu: {line}" for line in gpus()]
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    return "\n".join(lines) + "\n"


def commit() -> str | None:
    """The commit of the checkout that distft runs from, with a mark where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    answers = [
        subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=False)
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    ]
    if answers[0].returncode:
        return None
    return answers[0].stdout.strip() + (" with changes" if answers[1].stdout.strip() else "")


def gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
