"""`distft check` on a real run: it passes, and whatever is broken beneath it, the proof of that very thing fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import PATIENCE, Shop

BROKEN = Path(__file__).parent / "broken"
TRIAL = pytest.mark.trial("`distft check`: four proofs pass, and each fails when the thing that it proves is broken")


@dataclass(frozen=True)
class Checked:
    """How one check ended."""

    code: int
    text: str
    result: dict[str, Any]

    @property
    def failing(self) -> list[str]:
        return [proof["proof"] for proof in self.result["proofs"] if not proof["passed"]]

    @property
    def passing(self) -> list[str]:
        return [proof["proof"] for proof in self.result["proofs"] if proof["passed"]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("shop"))


def check(words: list[str], output: Path, broken: str = "") -> Checked:
    """`distft check …` with things broken in all of its processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BROKEN": broken}
    environment["PYTHONPATH"] = os.pathsep.join([str(BROKEN), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "distft", "check", *words, f"check.output={output}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    result = json.loads(output.read_text()) if output.exists() else {"proofs": []}
    return Checked(ended.returncode, ended.stdout + ended.stderr, result)


def words_of(shop: Shop, *overrides: str) -> list[str]:
    """A run's words, whose folder stays the check's own affair."""
    return [word for word in shop.words("check", *overrides) if not word.startswith("run.dir=")]


@TRIAL
def test_a_sound_stack_passes(shop: Shop, tmp_path: Path) -> None:
    done = check(words_of(shop, "strategy=fsdp"), tmp_path / "check.json")
    assert done.code == 0, done.text
    assert done.passing == ["packing", "invariance", "resume", "reload"]
    assert done.result["passed"]
    assert "4 of 4 proofs pass" in done.text
    values = {proof["proof"]: proof["value"] for proof in done.result["proofs"]}
    assert values["packing"] == values["resume"] == 0
    assert values["invariance"] < 1e-5
    assert "2x1x3, 1x1x6, 1x4x2" in done.text


@TRIAL
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("broken", "failing", "precision"),
    [
        ("naive packing", ["packing", "invariance"], "fp32"),  # the micro-batch decides which documents share a row
        ("mean of means", ["invariance"], "fp32"),
        ("mean of means", ["invariance"], "bf16"),
        ("lost random state", ["resume"], "fp32"),
        ("zeroed adapter", ["reload"], "fp32"),
    ],
)
def test_what_is_broken_is_what_fails(
    shop: Shop, tmp_path: Path, broken: str, failing: list[str], precision: str
) -> None:
    """With dropout in the adapters, whose masks a lost random state changes."""
    words = words_of(shop, "strategy=zero2", "tuning=lora", "tuning.lora_dropout=0.2", f"precision={precision}")
    words.append(f"run.dir={tmp_path / 'trials'}")  # what fails leaves its trials there
    done = check(words, tmp_path / "check.json", broken)
    assert done.code == 3, done.text
    assert done.failing == failing, done.text
    assert len(done.passing) == 4 - len(failing)


@TRIAL
@pytest.mark.thorough
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_every_engine_passes(shop: Shop, tmp_path: Path, strategy: str, tuning: str) -> None:
    done = check(words_of(shop, f"strategy={strategy}", f"tuning={tuning}"), tmp_path / "check.json")
    assert done.code == 0, done.text
    assert len(done.passing) == 4


@TRIAL
@pytest.mark.thorough
def test_a_run_folder_is_checked_and_gets_the_result(shop: Shop) -> None:
    code, text = shop.run("trained", "strategy=ddp", "max_steps=2", "precision=bf16")
    assert code == 0, text
    folder = shop.folder / "trained"
    ended = subprocess.run(
        [sys.executable, "-m", "distft", "check", f"run={folder}", "check.full=false"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "a narrow copy of the tiny model" in ended.stdout
    result = json.loads((folder / "check.json").read_text())
    assert result["passed"]
    assert (result["copy"], result["precision"], result["strategy"]) == (True, "bf16", "ddp")
