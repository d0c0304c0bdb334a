"""What is saved of a run, how all ranks save it together, and how any number of ranks takes it up again."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from distft.checkpoint import layout, ranges
from distft.checkpoint.layout import Damaged, Manifest
from distft.errors import NegativeVerdict, UserMistake
from distft.world import World

if TYPE_CHECKING:
    from distft.strategy.base import Shard, Strategy


@dataclass
class TrainState:
    """All of a run that changes besides weights and moments; plain JSON."""

    step: int = 0  # steps taken, skipped ones included
    num_updates: int = 0  # updates that changed the weights; the strategy counts them, `save` copies the number here
    cursor: dict[str, Any] = field(default_factory=dict)  # of the data plan
    best: float | None = None  # best value of `checkpoint.best`
    best_step: int | None = None
    evaluations_without_best: int = 0
    first_evaluation: dict[str, float] | None = None
    last_evaluation: dict[str, float] | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    config_hash: str = ""
    identity: dict[str, Any] = field(default_factory=dict)  # what a resumed run may not change, by knob
    source_tokens: dict[str, int] = field(default_factory=dict)  # real tokens seen, by source
    source_supervised: dict[str, int] = field(default_factory=dict)  # supervised tokens seen, by source
    base_hashes: dict[str, str] = field(default_factory=dict)  # of the model folder's weight files, see `hash_base`
    tracker_run: str | None = None  # W&B's run id

    @classmethod
    def of(cls, values: dict[str, Any]) -> TrainState:
        return cls(**values)

    def count(self, names: Sequence[str], tokens: Sequence[int], supervised: Sequence[int]) -> None:
        """Add one global batch to the accounts of the sources."""
        for name, num_tokens, num_supervised in zip(names, tokens, supervised, strict=True):
            self.source_tokens[name] = self.source_tokens.get(name, 0) + num_tokens
            self.source_supervised[name] = self.source_supervised.get(name, 0) + num_supervised


def save(run_dir: Path, strategy: Strategy, state: TrainState, world: World, *, keep: int, engine: str) -> Path:
    """Write the checkpoint of `state.step`; every rank writes its own ranges. Returns the complete step's folder.

    `engine`: the strategy's name, for the reader of the manifest. Afterwards only the `keep` newest and the best one
    are on disk. Collective: all ranks return or all raise.

    Raises:
        UserMistake: a rank could not write (a full disk, a lost mount); the checkpoints before it are untouched.
    """
    state.num_updates = strategy.num_updates
    folder = _begin(run_dir, state.step, world)
    shards = list(strategy.shards()) if strategy.writes_shards else []
    result: tuple[layout.FileRecord, dict[str, Any]] | str
    try:
        result = ranges.write(folder / layout.rank_file(world.rank), shards), ranges.coverage(shards)
    except OSError as error:
        result = f"{error.strerror}: {error.filename or folder}"
    results = _all_gather(result, world)
    failures = [f"rank {rank}: {one}" for rank, one in enumerate(results) if isinstance(one, str)]
    if failures:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserMistake(
            f"The checkpoint of step {state.step} could not be written ({'; '.join(failures[:3])}). Free space in "
            f"{run_dir} or set run.dir to another disk, then go on from the previous checkpoint with resume={run_dir}."
        )
    final = layout.step_folder(run_dir, state.step)

    def finish() -> None:
        kinds, shapes = ranges.complete(coverage for _, coverage in results)
        files = {layout.rank_file(rank): record for rank, (record, _) in enumerate(results)}
        values = dataclasses.asdict(state)
        layout.commit(folder, Manifest(state.step, engine, world.size, kinds, shapes, files, values))
        layout.retain(run_dir, state.step, keep, state.best_step)

    _on_main(finish, world)
    return final


def _begin(run_dir: Path, step: int, world: World) -> Path:
    """Make the folder on rank 0; every rank learns its name."""
    token = secrets.token_hex(4) if world.is_main else ""
    token = _all_gather(token, world)[0]
    _on_main(lambda: layout.begin(run_dir, step, token), world)
    return run_dir / layout.CHECKPOINTS / f"step-{step:06d}.tmp-{token}"


def load(source: Path, strategy: Strategy, world: World, say: Callable[[str], None]) -> TrainState:
    """Take up the newest sound checkpoint of `source`, a run folder or one checkpoint, into `strategy`.

    Sizes and hashes of every file are verified before a weight is used, each rank hashing its share of the files. One
    that is damaged is named through `say` (rank 0) and the one before it is taken. Each rank then reads just the
    ranges that it owns now. Collective.

    Raises:
        UserMistake: there is none, none is sound, or it holds other parameters or another optimizer's moments.
    """
    wrong: list[str] = []
    for folder in layout.candidates(source):
        manifest, problems = _verify(folder, world)
        if manifest is not None and not problems:
            _fill(folder, manifest, strategy, world)
            return TrainState.of(manifest.state)
        wrong += problems
        if world.is_main:
            for problem in problems:
                say(f"Checkpoint {folder.name} is damaged and passed over: {problem}.")
    if wrong:
        text = "; ".join(wrong[:3])
        raise UserMistake(f"resume: no checkpoint of {source} is sound: {text}. Start afresh with resume=never.")
    raise UserMistake(f"resume: {source} holds no complete checkpoint. Name a run folder or one of its step folders.")


def peek(source: Path) -> TrainState | None:
    """The state of the newest checkpoint whose manifest is sound and whose files have their sizes; None without one."""
    for folder in layout.candidates(source):
        try:
            return TrainState.of(layout.check(folder).state)
        except Damaged:
            continue
    return None


def _verify(folder: Path, world: World) -> tuple[Manifest | None, list[str]]:
    """The manifest, and what is wrong with the checkpoint; the same answer on every rank."""
    manifest: Manifest | None = None
    problems: list[str] = []
    try:
        manifest = layout.check(folder)
        for name in sorted(manifest.files)[world.rank :: world.size]:
            if ranges.hash_file(folder / name) != manifest.files[name].xxh3_128:
                problems.append(f"{folder / name} was changed since it was written (XXH3-128)")
    except Damaged as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename or folder} cannot be read: {error.strerror}")
    every = [problem for part in _all_gather(problems, world) for problem in part]
    return manifest, list(dict.fromkeys(every))


def _fill(folder: Path, manifest: Manifest, strategy: Strategy, world: World) -> None:
    """Read this rank's ranges into the strategy."""
    shards = list(strategy.shards())
    mismatches = [one for part in _all_gather(_mismatches(manifest, shards), world) for one in part]
    names = {name for part in _all_gather([shard.name for shard in shards], world) for name in part}
    mismatches += [f"{name} is not trained now" for name in manifest.shapes if name not in names]
    if mismatches:
        raise UserMistake(
            f"{folder} does not fit this run: {'; '.join(list(dict.fromkeys(mismatches))[:3])}. Resume with the model, "
            "tuning and optim.name it was written with, or start a new run from its final weights with resume=never."
        )
    first = world.rank * manifest.world_size // world.size  # where this rank's ranges most likely begin
    order = [(first + offset) % manifest.world_size for offset in range(manifest.world_size)]
    problem = ""
    try:
        ranges.read([folder / layout.rank_file(rank) for rank in order], shards)
    except Damaged as error:
        problem = str(error)
    problems = [one for one in _all_gather(problem, world) if one]
    if problems:  # the hashes were right, so this is not the disk
        raise RuntimeError(f"a checkpoint whose hashes are right does not hold what it should: {problems[0]}")
    strategy.refresh()
    strategy.num_updates = TrainState.of(manifest.state).num_updates


def _mismatches(manifest: Manifest, shards: list[Shard]) -> list[str]:
    found = []
    for shard in shards:
        stored = manifest.shapes.get(shard.name)
        if stored is None:
            found.append(f"it has no {shard.name}")
        elif tuple(stored) != shard.shape:
            found.append(f"{shard.name} has shape {stored} there and {list(shard.shape)} here")
        elif shard.kind not in manifest.kinds:
            found.append(f"it has no {shard.kind} (another optimizer wrote it)")
    return list(dict.fromkeys(found))


def verify_saved(folder: Path, strategy: Strategy, world: World) -> None:
    """Re-read what this rank wrote and compare it bit for bit with what it trains. Collective.

    Raises:
        NegativeVerdict: the disk does not hold what was written.
    """
    wrong: list[str] = []
    if strategy.writes_shards:
        wrong = ranges.differing(folder / layout.rank_file(world.rank), list(strategy.shards()))
    every = [f"{key} of rank {rank}" for rank, keys in enumerate(_all_gather(wrong, world)) for key in keys]
    if every:
        raise NegativeVerdict(
            f"{folder} does not hold what was trained: {', '.join(every[:3])}. The disk of run.dir loses data."
        )


def hash_base(folder: Path, world: World) -> dict[str, str]:
    """XXH3-128 of every weight file of the model folder, each rank hashing its share. Collective.

    A checkpoint does not hold a frozen base, only these: `check_base` refuses to go on from another one.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    part = {name: ranges.hash_file(folder / name) for name in names[world.rank :: world.size]}
    return {name: digest for one in _all_gather(part, world) for name, digest in sorted(one.items())}


def check_base(state: TrainState, hashes: dict[str, str], folder: Path) -> None:
    """
    Raises:
        UserMistake: the base model is not the one that the checkpoint was trained on.
    """
    if not state.base_hashes:
        return
    names = sorted(state.base_hashes.keys() | hashes.keys())
    changed = [name for name in names if state.base_hashes.get(name) != hashes.get(name)]
    if changed:
        raise UserMistake(
            f"model.path: {folder / changed[0]} is not the file that the checkpoint was trained on. Bring back the "
            "base model of that run, or start a new run with resume=never."
        )


# --- all ranks alike --------------------------------------------------------------------------------------------------


def _all_gather(value: Any, world: World) -> list[Any]:
    """Every rank's `value`, in order of rank."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered


def _on_main(action: Callable[[], Any], world: World) -> None:
    """Run on rank 0; the others wait for it, and where it raises, all ranks raise."""
    problem: tuple[str, bool] | None = None
    if world.is_main:
        try:
            action()
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}", True
        except Exception as error:  # told on every rank instead of leaving the others in a collective
            problem = f"{type(error).__name__}: {error}", False
    problem = _all_gather(problem, world)[0]
    if problem is None:
        return
    text, of_the_disk = problem
    if of_the_disk:
        raise UserMistake(f"The checkpoint could not be written ({text}). Set run.dir to another disk, then resume.")
    raise RuntimeError(text)
