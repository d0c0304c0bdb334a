"""Where checkpoints lie in a run folder, and when one counts as complete.

    <run>/checkpoints/step-000100/rank-00000.safetensors …   one file of flat ranges a rank, see ranges.py
    <run>/checkpoints/step-000100/manifest.json              sizes and XXH3-128 of the files, shapes, the run's state
    <run>/checkpoints/latest                                 newest step and its manifest's sha256
    <run>/checkpoints/step-000200.tmp-4f2a91c0/              being written, or left over from a run that was killed

A step appears by a rename after everything in it has reached the disk and was read back from there with equal hashes:
a folder named `step-N` is whole and was verified once. Only then do older ones go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.weights.write import fsync

FORMAT = 1
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
STEP = re.compile(r"step-(\d{6,})")
LEFTOVER = re.compile(r"step-\d{6,}\.tmp-[0-9a-f]+")
STAGED_FINAL = re.compile(r"final\.(tmp|old)-[0-9a-f]{8}")  # as weights.write.new_folder calls them


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """What one rank wrote."""

    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`."""

    step: int
    strategy: str  # the engine and number of ranks that wrote it; any engine on any number of ranks reads it
    world_size: int
    kinds: list[str]  # "param" and the optimizer's moments
    shapes: dict[str, list[int]]  # trained parameters by name
    files: dict[str, FileRecord]
    state: dict[str, Any]  # TrainState
    format: int = FORMAT

    def text(self) -> str:
        """JSON that carries its own sha256, so that a flipped bit is found in any manifest, not in the latest alone."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, "sha256": _digest(values)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            Damaged: missing, not JSON, of another format, or changed since it was written.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            digest = values.pop("sha256")
            if values["format"] != FORMAT:
                raise Damaged(f"{path} has format {values['format']}, this version reads {FORMAT}")
            if digest != _digest(values):
                raise Damaged(f"{path} was changed since it was written")
            files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
            return cls(files=files, **values)
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{path} is not a checkpoint's manifest") from error


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def steps(run_dir: Path) -> list[int]:
    """Steps that were published, ascending; whether they are still what was published, `check` tells."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = (STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def candidates(source: Path, newest: int | None = None) -> list[Path]:
    """Checkpoints to try, the newest first: `source` itself if it is one, else those of the run folder `source`.

    newest: leaves out later steps of a run folder.
    """
    if (source / MANIFEST).is_file():
        return [source]
    return [step_folder(source, step) for step in reversed(steps(source)) if newest is None or step <= newest]


def run_folder(source: Path) -> Path:
    """The run folder that `source` is, or that the checkpoint `source` lies in."""
    return source.absolute().parent.parent if (source / MANIFEST).is_file() else source


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint; None without one. Whether its files are sound is seen when it is loaded."""
    return next(iter(candidates(run_dir)), None)


def check(folder: Path) -> Manifest:
    """Everything that can be checked without reading the tensors: manifest, `latest`, presence and size of the files.

    Raises:
        Damaged: naming the file.
    """
    manifest = Manifest.read(folder)
    # Before anything of the size or by the name that it claims is made or opened.
    expected = {rank_file(rank) for rank in range(len(manifest.files))}
    if manifest.world_size != len(manifest.files) or set(manifest.files) != expected:
        raise Damaged(f"{folder / MANIFEST} names other files than those of {manifest.world_size} ranks")
    pointer = _read_latest(folder.parent)
    if pointer.get("folder") == folder.name and pointer.get("manifest_sha256") != _sha256(folder / MANIFEST):
        raise Damaged(f"{folder / MANIFEST} is not the one that {folder.parent / LATEST} names")
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != record.num_bytes:
            raise Damaged(f"{path} has {path.stat().st_size} bytes instead of {record.num_bytes}")
    return manifest


def _read_latest(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / LATEST).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clean(run_dir: Path) -> list[str]:
    """Delete what saves that died have left over, of checkpoints and of the final folder; returns the names.

    Whoever calls it holds the run folder's lock, and writes nothing there.
    """
    folder = run_dir / CHECKPOINTS
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    dead = [path for path in inside if LEFTOVER.fullmatch(path.name)]
    dead += [path for path in sorted(run_dir.glob("final.*")) if STAGED_FINAL.fullmatch(path.name)]
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
    (folder / f"{LATEST}.tmp").unlink(missing_ok=True)
    return [path.name for path in dead]


def begin(run_dir: Path, step: int, token: str) -> Path:
    """Make the folder into which the ranks write; clears what a save that failed left over. One rank calls it."""
    folder = run_dir / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    clean(run_dir)
    made = folder / f"step-{step:06d}.tmp-{token}"
    made.mkdir()
    return made


def commit(written: Path, manifest: Manifest) -> Path:
    """Turn the folder `written`, whose rank files are on the disk, into the complete step. One rank calls it.

    Killed at any instant, either the step is not there and the ones before it are, or it is there whole.
    """
    text = manifest.text()
    write_synced(written / MANIFEST, text)
    fsync(written)
    digest = _sha256(written / MANIFEST)
    if digest != hashlib.sha256(text.encode()).hexdigest():
        raise Damaged(f"{written / MANIFEST} is not what was written into it")
    final = written.parent / f"step-{manifest.step:06d}"
    if final.exists():  # the same step from before the run went back behind it
        discard(final)
    os.rename(written, final)
    fsync(final.parent)
    pointer = {"step": manifest.step, "folder": final.name, "manifest_sha256": digest}
    replacement = final.parent / f"{LATEST}.tmp"
    write_synced(replacement, json.dumps(pointer))
    os.replace(replacement, final.parent / LATEST)
    fsync(final.parent)
    return final


def retain(run_dir: Path, current: int, keep: int, best: int | None) -> list[int]:
    """Delete what is no longer needed after step `current` was saved; returns the steps that stay.

    The `keep` newest stay (the one just saved in any case), and the `best`. Steps beyond `current` belong to a past
    from which this run went back, and go.
    """
    present = steps(run_dir)
    newest = [step for step in present if step <= current][-max(1, keep) :]
    stay = [step for step in present if step in newest or (step == best and step <= current)]
    for step in present:
        if step not in stay:
            discard(step_folder(run_dir, step))
    return stay


def discard(folder: Path) -> None:
    """Delete a step so that it is never seen half deleted."""
    doomed = folder.with_name(f"{folder.name}.tmp-dead")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
