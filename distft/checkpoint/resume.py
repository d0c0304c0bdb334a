"""From where a run goes on, and whether what goes on is still the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.checkpoint import layout, state
from distft.checkpoint.ranks import Ranks
from distft.checkpoint.state import TrainState
from distft.config.given import within
from distft.config.load import config_hash
from distft.config.resuming import HARMFUL, changed, compared
from distft.config.schema import Run
from distft.data.cache import digest, digest_of_files
from distft.errors import UserMistake
from distft.prepared import Prepared
from distft.world import World

if TYPE_CHECKING:
    from distft.strategy.base import Strategy

SHOWN = 40  # characters of a value in a message
WRITTEN_BY = ("_name_or_path", "transformers_version")  # of a config.json: they change with nothing that is computed


def fresh_state(run: Run, prepared: Prepared, base_hashes: dict[str, str]) -> TrainState:
    """Where a run begins, with all that a later half of it is compared by."""
    return TrainState(
        config_hash=config_hash(run),
        identity=identity_of(prepared),
        config=compared(run),
        base_hashes=base_hashes,
    )


def identity_of(prepared: Prepared) -> dict[str, Any]:
    """Hashes of what must not change between two halves of a run, by the section of knobs that changes it."""
    folder = Path(prepared.tokenizer_folder)
    names = ("tokenizer.json", "chat_template.jinja")
    model = json.loads((Path(prepared.model_folder) / "config.json").read_text(encoding="utf-8"))
    return {
        "data": prepared.data_hash,
        "tokenizer": digest_of_files((name, folder / name) for name in names if (folder / name).is_file()),
        "model": digest({key: value for key, value in model.items() if key not in WRITTEN_BY}),
    }


def source_of(run: Run, run_dir: Path) -> Path | None:
    """The run folder or checkpoint to go on from; None for a fresh start."""
    if run.resume == "never":
        return None
    if run.resume != "auto":
        return Path(run.resume)
    return run_dir if layout.candidates(run_dir) else None


def compare(saved: TrainState, now: TrainState, allowed: Sequence[str]) -> list[str]:
    """What differs between two halves of a run and may, a phrase a knob.

    Raises:
        UserMistake: something differs that makes another run of it and is not in `allowed` (`resume_allow`).
    """
    hashed = {name: f"{name} was {saved.identity[name]}, is {now.identity[name]}"
              for name in changed(saved.identity, now.identity)}  # fmt: skip
    knobs = {
        name: f"{name} was {shown(saved.config[name])}, is {shown(now.config[name])}"
        for name in changed(saved.config, now.config)
    }
    harmful = hashed | {name: text for name, text in knobs.items() if within(name, HARMFUL)}
    refused = [name for name in harmful if not within(name, allowed)]
    if refused:
        behind = [text for name, text in knobs.items() if name not in harmful]
        because = f" (also changed: {'; '.join(behind)})" if behind and set(refused) & set(hashed) else ""
        raise UserMistake(
            f"resume: the checkpoint belongs to another run: {'; '.join(harmful[name] for name in refused)}{because}. "
            f"Set it back, start anew with resume=never and another run.dir, or accept the change with "
            f"resume_allow=[{','.join(refused)}]."
        )
    return [*(harmful | knobs).values()]


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def refuse_early(run: Run, run_dir: Path, prepared: Prepared) -> None:
    """As `compare`, before anything is started; which checkpoint is sound is seen later.

    Raises:
        UserMistake: see `compare`.
    """
    source = source_of(run, run_dir)
    if source is not None and (saved := state.peek(source)):
        compare(saved, fresh_state(run, prepared, {}), run.resume_allow)


def restore(
    run: Run, run_dir: Path, prepared: Prepared, base_hashes: dict[str, str], strategy: Strategy, world: World,
    say: Callable[[str], None],
) -> tuple[TrainState, int | None]:  # fmt: skip
    """The state to start from, and the step of the checkpoint that it came from (None: a fresh start). Collective.

    What saves that died have left in `run_dir` is deleted first. `say` is called on rank 0 alone.

    Raises:
        UserMistake: no checkpoint is sound, or it belongs to another run.
    """
    ranks, fresh = Ranks(world), fresh_state(run, prepared, base_hashes)
    told = say if world.is_main else (lambda text: None)
    if world.is_main and (dead := layout.clean(run_dir)):
        told(f"What an interrupted save left over is deleted: {', '.join(dead)}")
    source = ranks.first(source_of(run, run_dir))
    if source is None:
        return fresh, None
    folder, manifest = state.choose(source, world, told)
    saved = TrainState.of(manifest.state)
    differences = compare(saved, fresh, run.resume_allow)
    if manifest.strategy != run.strategy.name or manifest.world_size != world.size:
        now = f"{run.strategy.name} on {world.size}"
        differences.append(f"it was written by {manifest.strategy} on {manifest.world_size} ranks, read by {now}")
    if differences:
        told(f"Changed since {folder.name}: {'; '.join(differences)}")
    if not within("model.path", run.resume_allow):
        state.check_base(saved, base_hashes, Path(prepared.model_folder))
    state.fill(folder, manifest, strategy, world)
    if any(name in changed(saved.config, fresh.config) for name in ("checkpoint.best", "checkpoint.mode")):
        saved.best, saved.best_step, saved.evaluations_without_best = None, None, 0  # of another measure
    saved.config_hash, saved.identity, saved.config = fresh.config_hash, fresh.identity, fresh.config
    saved.base_hashes = fresh.base_hashes
    return saved, saved.step
