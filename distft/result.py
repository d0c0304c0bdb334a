"""How a run ended: `result.json` for programs, the last lines on the screen for a person."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.schema import Run

if TYPE_CHECKING:
    from distft.checkpoint.state import TrainState

RESULT = "result.json"


def write_result(
    run_dir: Path, status: str, state: TrainState, final: Path | None, data_hash: str, reason: str | None = None
) -> None:
    """Write `result.json`. `final`: the folder of the tuned model if there is one; `reason`: of an early end."""
    result = {
        "status": status,
        "reason": reason,
        "steps": state.step,
        "metrics": summary_of(state),
        "final": str(final) if final else None,
        "sources": {
            name: {"tokens": tokens, "supervised_tokens": state.source_supervised[name]}
            for name, tokens in state.source_tokens.items()
        },
        "config_hash": state.config_hash,
        "data_hash": data_hash,
    }
    _write(run_dir, result)


def write_failure(run_dir: Path, status: str, reason: str, step: int) -> None:
    """Write the `result.json` of a run that cannot write its own. `step`: of its newest checkpoint, 0 without one."""
    _write(run_dir, {"status": status, "reason": reason, "steps": step, "metrics": {}, "final": None})


def _write(run_dir: Path, result: dict[str, Any]) -> None:
    """At once or not at all. Where the disk refuses it, that is said; how the run ended is told all the same."""
    staged = run_dir / f"{RESULT}.tmp"
    try:
        staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        staged.replace(run_dir / RESULT)
    except OSError as error:
        staged.unlink(missing_ok=True)
        sys.stderr.write(f"distft: {run_dir / RESULT} could not be written: {error.strerror}\n")


def summary_of(state: TrainState) -> dict[str, Any]:
    """`best`: the best value of checkpoint.best; evaluation before training and at the end."""
    return {
        "best": state.best,
        "best_step": state.best_step,
        "first": state.first_evaluation,
        "last": state.last_evaluation,
        "skipped": state.skipped,
        "spikes": state.spikes,
        "rollbacks": len(state.rollbacks),
    }


def tell_the_end(
    run: Run, run_dir: Path, state: TrainState, samples: Sequence[dict[str, str]], final: Path | None
) -> None:
    """The last lines: what changed, one answer, where the model lies, what to type next."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    first, last = state.first_evaluation, state.last_evaluation
    console.print()
    if first and last:
        console.print(f"Evaluation loss {first['loss']:.4f} -> {last['loss']:.4f} after {state.step} steps")
    elif last:
        console.print(f"Evaluation loss {last['loss']:.4f} after {state.step} steps")
    if samples:
        sample = samples[0]
        console.print(Text(f"Asked     {one_line(sample['prompt'])}"))
        console.print(Text(f"Answered  {one_line(sample['answer'])}"))
        console.print(Text(f"Reference {one_line(sample['reference'])}"))
    if final is None:
        console.print(f"Pruned by its sweep after step {state.step}, without a final model; {run_dir}")
        return
    console.print(f"The model lies in {final}")
    console.print(f'Ask it:   distft generate {shlex.quote(str(final))} prompt="…"')
    if run.data.format == "python_docs":
        console.print(
            "Your own: deepspeed train.py model=hf model.path=MODEL data=jsonl data.path=ROWS.jsonl tuning=lora"
        )


def one_line(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
