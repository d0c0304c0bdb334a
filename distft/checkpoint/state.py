"""What is saved of a run, and how any number of ranks takes it up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from distft.checkpoint import layout, ranges
from distft.checkpoint.layout import Damaged, Manifest
from distft.checkpoint.ranks import Ranks
from distft.checkpoint.writing import write
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
    spikes: int = 0  # of the loss, under guard.spike
    rollbacks: list[int] = field(default_factory=list)  # steps of the checkpoints that the run went back to
    recent_losses: list[float] = field(default_factory=list)  # that the next ones are compared with
    config_hash: str = ""
    identity: dict[str, Any] = field(default_factory=dict)  # hashes of what a resumed run may not change
    config: dict[str, Any] = field(default_factory=dict)  # the knobs that a resumed run is compared by
    source_tokens: dict[str, int] = field(default_factory=dict)  # real tokens seen, by source
    source_supervised: dict[str, int] = field(default_factory=dict)  # supervised tokens seen, by source
    base_hashes: dict[str, str] = field(default_factory=dict)  # of the model folder's weight files, see `hash_base`
    tracker_run: str | None = None  # W&B's run id
    proof: dict[str, Any] = field(default_factory=dict)  # tokenizer and logits at this step, see `model.proof.prove`

    @classmethod
    def of(cls, values: dict[str, Any]) -> TrainState:
        """
        Raises:
            Damaged: it is no state, or that of another version.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise Damaged(f"the state in its {layout.MANIFEST} is not that of a run ({error})") from None

    def go_back(self, saved: TrainState) -> None:
        """Take over what training had made at an earlier step; what the run is, and how often it went back, stays."""
        stays = ("config_hash", "identity", "config", "base_hashes", "tracker_run", "spikes", "rollbacks")
        vars(self).update({name: value for name, value in vars(saved).items() if name not in stays})

    def count(self, names: Sequence[str], tokens: Sequence[int], supervised: Sequence[int]) -> None:
        """Add one global batch to the accounts of the sources."""
        for name, num_tokens, num_supervised in zip(names, tokens, supervised, strict=True):
            self.source_tokens[name] = self.source_tokens.get(name, 0) + num_tokens
            self.source_supervised[name] = self.source_supervised.get(name, 0) + num_supervised


def save(run_dir: Path, strategy: Strategy, state: TrainState, world: World, *, keep: int, engine: str) -> Path:
    """Write the checkpoint of `state.step` at once; every rank writes its own ranges. Returns the step's folder.

    See `write`; behind.py does the same beside training. Collective: all ranks return or all raise.
    """
    state.num_updates = strategy.num_updates
    return write(run_dir, owned(strategy), dataclasses.asdict(state), Ranks(world), keep=keep, engine=engine)


def owned(strategy: Strategy) -> list[Shard]:
    """What this rank puts into a checkpoint."""
    return list(strategy.shards()) if strategy.writes_shards else []


def load(
    source: Path, strategy: Strategy, world: World, say: Callable[[str], None], newest: int | None = None
) -> TrainState:
    """Take up the newest sound checkpoint of `source`, a run folder or one checkpoint, into `strategy`.

    newest: later steps are not looked at.

    Sizes and hashes of every file are verified before a weight is used, each rank hashing its share of the files. One
    that is damaged is named through `say` (rank 0) and the one before it is taken. Each rank then reads just the
    ranges that it owns now. Collective.

    Raises:
        UserMistake: there is none, none is sound, or it holds other parameters or another optimizer's moments.
    """
    folder, manifest = choose(source, world, say, newest)
    fill(folder, manifest, strategy, world)
    return TrainState.of(manifest.state)


def choose(source: Path, world: World, say: Callable[[str], None], newest: int | None = None) -> tuple[Path, Manifest]:
    """The newest checkpoint of `source` that verifies, as in `load`. Collective.

    Raises:
        UserMistake: there is none, or none is sound.
    """
    wrong: list[str] = []
    for folder in Ranks(world).first(layout.candidates(source, newest)):
        manifest, problems = _verify(folder, world)
        if manifest is not None and not problems:
            return folder, manifest
        wrong += problems
        if world.is_main:
            for problem in problems:
                say(f"Checkpoint {folder.name} is damaged and passed over: {problem}.")
    if wrong:
        text = "; ".join(wrong[:3])
        raise UserMistake(
            f"resume: no checkpoint of {source} is sound: {text}. Start anew with resume=never and another run.dir."
        )
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
        TrainState.of(manifest.state)
        problems += ranges.wrong_files(folder, manifest, sorted(manifest.files)[world.rank :: world.size])
    except Damaged as error:
        problems.append(str(error))
    every = [problem for part in Ranks(world).gather(problems) for problem in part]
    return manifest, list(dict.fromkeys(every))


def fill(folder: Path, manifest: Manifest, strategy: Strategy, world: World) -> None:
    """Read this rank's ranges of a checkpoint that was verified into the strategy. Collective.

    Raises:
        UserMistake: it holds other parameters or another optimizer's moments.
    """
    shards, ranks = list(strategy.shards()), Ranks(world)
    mismatches = [one for part in ranks.gather(_mismatches(manifest, shards)) for one in part]
    names = {name for part in ranks.gather([shard.name for shard in shards]) for name in part}
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
    problems = [one for one in ranks.gather(problem) if one]
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


def verify_saved(folder: Path, shards: Sequence[Shard], ranks: Ranks) -> None:
    """Re-read what this rank wrote and compare it bit for bit with `shards`; on rank 0 also look the whole over, as
    `distft verify` does before it reads values. Collective.

    Raises:
        NegativeVerdict: the disk does not hold what was written.
    """
    wrong: list[str] = []
    try:
        wrong = ranges.differing(folder / layout.rank_file(ranks.world.rank), shards) if shards else []
        if ranks.world.is_main:
            wrong += ranges.incomplete(folder, layout.check(folder))
    except (OSError, SafetensorError, Damaged) as error:
        wrong = [f"the file ({error})"]
    every = [f"{key} of rank {rank}" for rank, keys in enumerate(ranks.gather(wrong)) for key in keys]
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
    return {name: digest for one in Ranks(world).gather(part) for name, digest in sorted(one.items())}


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
