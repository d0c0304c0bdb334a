"""Save and reload: what plain transformers or PEFT load from the final folder computes what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from distft.checkpoint import layout
from distft.config.schema import Run
from distft.errors import Stop
from distft.prepared import Prepared
from distft.proofs.outcome import Outcome, failed
from distft.proofs.packing import alone
from distft.proofs.trial import Trial

ROWS, LONGEST = 2, 48  # of each source, tokens of each


def prove(trial: Trial, failures: Mapping[str, str], prepared: Prepared, precision: str) -> Outcome:
    """Logits of rows of the run: of the trainee with the last checkpoint's weights, and of the final folder loaded
    without distft. They must be nearer to each other than to those of the model before training."""
    from distft.model.logits import types_of
    from distft.model.probe import NOISE, TOLERANCE
    from distft.weights.store import FolderWeights

    final = trial.folder / "final"
    kind = "peft" if trial.run.tuning.method == "lora" else "transformers"
    compared = f"logits of final/ under plain {kind} with the trainee's"
    reason = failures[trial.folder.name]
    if reason or not final.is_dir():
        return failed("reload", compared, reason or "there is no final folder", TOLERANCE["fp32"])
    stored = FolderWeights(final, sorted(path.name for path in final.glob("*.safetensors")))
    low = precision == "bf16" or not types_of(stored).isdisjoint((torch.bfloat16, torch.float16))
    tolerance, noise = TOLERANCE["bf16" if low else "fp32"], NOISE["bf16" if low else "fp32"]
    try:
        off, untrained = distances(trial.run, trial.folder, final, prepared, precision)
    except Stop as stop:
        return failed("reload", compared, str(stop), tolerance)
    bound = min(tolerance, max(noise, untrained / 2))
    seen = f"{off:.1g} of their spread apart, the model before training {untrained:.2g}"
    return Outcome("reload", compared, seen, off, bound, passed=off <= bound)


def distances(run: Run, folder: Path, final: Path, prepared: Prepared, precision: str) -> tuple[float, float]:
    """How far the logits of the final folder, and of the model before training, are from those of what was trained.

    Raises:
        Stop: the checkpoint or the folder cannot be loaded.
    """
    from distft.checkpoint.state import load
    from distft.data.cache import open_prepared
    from distft.evaluation.samples import take_probe
    from distft.model.plain import load_plain
    from distft.model.probe import distance, logits_of

    data = open_prepared(Path(prepared.data_folder))
    last = layout.step_folder(folder, int(run.max_steps or 0))
    with alone(run, prepared, precision) as (strategy, world):
        load(last, strategy, world, say=lambda text: None)
        rows = [
            source.row(row)[0][:LONGEST].tolist()
            for source in data.train
            for row in range(min(ROWS, len(source.lengths)))
        ]
        probe = take_probe(strategy, rows, world)
    found = []
    for source in (final, Path(prepared.model_folder)):
        model = load_plain(source, precision, torch.device("cpu"), run.model.trust_remote_code)
        found.append(distance(logits_of(model, probe), probe.logits))
    return found[0], found[1]
