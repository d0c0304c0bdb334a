"""A 50-step curve of a fixed model on fixed rows, kept in git: a change in any digit that matters is a decision.

`python tests/golden/test_curve.py --write` writes a new curve; the commit that does so says why.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CURVE = HERE / "curve.json"
TOLERANCE = 1e-4  # relative: processors differ in the order of their sums


def train(folder: Path, *overrides: str) -> dict[str, list[float]]:
    """Losses and gradient norms by step, and evaluation losses, of a real run of `train.py` in `folder`."""
    command = [
        sys.executable, str(HERE.parents[1] / "train.py"), "data=jsonl", f"data.path={HERE / 'rows.jsonl'}",
        "data.sequence_length=256", "data.eval_fraction=0.1", "model.tiny.hidden_size=64", "model.tiny.num_layers=2",
        "model.tiny.intermediate_size=128", "model.tiny.vocab_size=512", "batch.global_size=4", "batch.micro_size=2",
        "strategy=ddp", "precision=fp32", "schedule=constant", "schedule.warmup=0", "optim.lr=2e-3",
        "log=none", "log.every=1", "eval.every=25", "eval.samples=0", f"run.dir={folder}/run",
        f"data.cache_dir={folder}/cache", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    by_split = {split: [r for r in records if r["split"] == split] for split in ("train", "eval")}
    return {
        "loss": [record["loss"] for record in by_split["train"]],
        "grad_norm": [record["grad_norm"] for record in by_split["train"]],
        "eval_loss": [record["loss"] for record in by_split["eval"]],
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, list[float]]:
    return dict(json.loads(CURVE.read_text()))


def test_the_curve_is_the_one_in_git(tmp_path: Path, golden: dict[str, list[float]]) -> None:
    curve = train(tmp_path, "max_steps=50")
    assert len(curve["loss"]) == 50
    for name, values in golden.items():
        assert curve[name] == pytest.approx(values, rel=TOLERANCE), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=zero2", "launch.ranks=2", "batch.micro_size=1"),
        ("strategy=fsdp", "launch.ranks=2", "data.packing=false", "batch.pass_tokens=70"),
    ],
    ids=["zero2-2-ranks", "fsdp-2-ranks-unpacked-in-passes"],
)
def test_engine_ranks_and_layout_do_not_move_it(
    tmp_path: Path, golden: dict[str, list[float]], overrides: tuple[str, ...]
) -> None:
    curve = train(tmp_path, "max_steps=10", "eval.every=0", *overrides)
    assert curve["loss"] == pytest.approx(golden["loss"][:10], rel=TOLERANCE)
    assert curve["grad_norm"] == pytest.approx(golden["grad_norm"][:10], rel=TOLERANCE)
    assert curve["eval_loss"][0] == pytest.approx(golden["eval_loss"][0], rel=TOLERANCE)


def test_a_learning_rate_one_percent_off_is_noticed(tmp_path: Path, golden: dict[str, list[float]]) -> None:
    curve = train(tmp_path, "max_steps=10", "optim.lr=2.02e-3", "eval.at_start=false", "eval.every=0")
    assert curve["loss"][0] == pytest.approx(golden["loss"][0], rel=TOLERANCE), "the first loss precedes any update"
    assert curve["loss"] != pytest.approx(golden["loss"][:10], rel=TOLERANCE)


if __name__ == "__main__" and "--write" in sys.argv:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        CURVE.write_text(json.dumps(train(Path(scratch), "max_steps=50"), indent=1) + "\n")
