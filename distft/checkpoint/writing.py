"""How all ranks write one checkpoint together, so that it is there whole and verified, or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.checkpoint import layout, ranges
from distft.checkpoint.layout import Damaged, Manifest
from distft.checkpoint.ranks import DiskFull, Problem, Ranks, gravest
from distft.checkpoint.space import check_space
from distft.errors import NegativeVerdict
from distft.launch.lock import check_held

if TYPE_CHECKING:
    from distft.strategy.base import Shard


def write(
    run_dir: Path, shards: Sequence[Shard], values: dict[str, Any], ranks: Ranks, *, keep: int, engine: str
) -> Path:
    """Write the checkpoint of a state's `values`, this rank's part being `shards`. Returns the step's folder.

    Every rank writes its file, syncs it, and reads it back from the disk; the step gets its name once all of them are
    right, and only then do older steps go. Collective: all ranks return or all raise. `shards` must not change
    meanwhile; where they change later, nothing of them is kept. It may run on a thread: it talks to the other ranks
    over the group of `ranks` alone.

    Args:
        keep: how many of the newest stay on disk; the best one stays too.
        engine: the strategy's name, for the reader of the manifest.

    Raises:
        DiskFull: there is no room for it; the checkpoints before it are untouched, as with the others.
        UserMistake: a rank could not write (a lost mount, a read-only disk).
        NegativeVerdict: the disk does not hold what was written.
    """
    step = values["step"]
    folder = _begin(run_dir, step, shards, ranks)
    result: tuple[layout.FileRecord, dict[str, Any]] | Problem
    try:
        result = _write_own(folder / layout.rank_file(ranks.world.rank), shards), ranges.coverage(shards)
    except Exception as error:  # told on every rank instead of leaving the others in a collective
        result = Problem.of(error)
    results = ranks.gather(result)
    failed = {rank: one for rank, one in enumerate(results) if isinstance(one, Problem)}
    if failed:
        ranks.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))  # gone before any rank tells
        reasons = "; ".join(f"rank {rank}: {one.text}" for rank, one in list(failed.items())[:3])
        raise refusal(run_dir, step, gravest(list(failed.values())), reasons)

    def finish() -> None:
        kinds, shapes = ranges.complete(coverage for _, coverage in results)
        files = {layout.rank_file(rank): record for rank, (record, _) in enumerate(results)}
        try:
            final = layout.commit(folder, Manifest(step, engine, ranks.world.size, kinds, shapes, files, values))
            layout.check(final)
        except Damaged as error:
            raise NegativeVerdict(f"{error}. The disk of run.dir loses data.") from None
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            problem = Problem.of(error)
            raise refusal(run_dir, step, problem.kind, problem.text) from None
        layout.retain(run_dir, step, keep, values["best_step"])

    ranks.on_main(finish)
    return layout.step_folder(run_dir, step)


def _begin(run_dir: Path, step: int, shards: Sequence[Shard], ranks: Ranks) -> Path:
    """Make the folder on rank 0, if all ranks' files fit on its disk; every rank learns its name."""
    asked = ranks.gather((secrets.token_hex(4), ranges.num_bytes_of(shards)))
    token, num_bytes = asked[0][0], sum(num_bytes for _, num_bytes in asked)

    def begin() -> None:
        check_held(run_dir)
        try:
            folder = layout.begin(run_dir, step, token)
        except OSError as error:
            problem = Problem.of(error)
            raise refusal(run_dir, step, problem.kind, problem.text) from None
        try:
            check_space(run_dir, step, num_bytes)
        except DiskFull as full:
            folder.rmdir()
            raise DiskFull(f"{full} {cure(run_dir, DiskFull)}") from None

    ranks.on_main(begin)
    return run_dir / layout.CHECKPOINTS / f"step-{step:06d}.tmp-{token}"


def _write_own(path: Path, shards: Sequence[Shard]) -> layout.FileRecord:
    """Write this rank's file and read it back from the disk."""
    record = ranges.write(path, shards)
    if wrong := ranges.read_back(path, record):
        raise NegativeVerdict(wrong)
    return record


def refusal(run_dir: Path, step: int, kind: type[Exception], reasons: str) -> Exception:
    """What is raised on all ranks where the checkpoint of `step` could not be written."""
    if kind is RuntimeError:
        return RuntimeError(f"the checkpoint of step {step} could not be written ({reasons})")
    return kind(f"The checkpoint of step {step} could not be written ({reasons}). {cure(run_dir, kind)}")


def cure(run_dir: Path, kind: type[Exception]) -> str:
    if kind is NegativeVerdict:
        return "The disk of run.dir loses data; the checkpoints before this one are untouched."
    return f"Free space in {run_dir} or set run.dir to another disk."
