"""Every shipped YAML file composes and passes the rules, every experiment trains, every knob is read by some code."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import distft
from distft.config.check import check
from distft.config.load import SCHEMAS, compose, conf_dir
from distft.config.schema import Run
from distft.config.schema.check import CheckedRun
from distft.config.schema.doctor import DoctoredRun
from distft.config.schema.generate import Generate
from distft.config.schema.report import ReportOn
from distft.config.schema.verify import Verify
from distft.config.words import knobs
from distft.errors import UserMistake
from tests.small_run import SMALL, write_rows

CHOICES = sorted(
    path.relative_to(conf_dir()).with_suffix("").as_posix()
    for path in conf_dir().rglob("*.yaml")
    if path.parent != conf_dir()
)
EXPERIMENTS = [choice.partition("/")[2] for choice in CHOICES if choice.startswith("experiment/")]
PRIMARIES = sorted(path.stem for path in conf_dir().glob("*.yaml"))


def needs(choice: str, rows: Path) -> list[str]:
    """What a choice asks the user for."""
    group, _, option = choice.partition("/")
    if (group, option) == ("model", "hf"):
        return ["model.path=owner/name"]
    if (group, option) == ("launch", "slurm"):
        return ["launch.gpus_per_node=8"]
    if choice == "launch/ssh":
        return [f"launch.hostfile={rows}"]
    if group == "data" and option != "python_docs":
        return [f"data.path={rows}"]
    return []


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_passes_the_rules(choice: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 1)
    run = compose([choice.replace("/", "="), *needs(choice, rows)]).run
    assert check(run) == []


def test_every_primary_config_composes() -> None:
    assert sorted(SCHEMAS) == PRIMARIES
    for primary in PRIMARIES:
        compose([], verb=primary)


def test_a_wrong_shipped_file_would_be_seen(tmp_path: Path) -> None:
    """Negative control: the same composition, over a group file with a key that does not exist."""
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "wrong.yaml").write_text("name: adamw\nlearning_rate: 1\n")
    with pytest.raises(UserMistake, match=r"optim\.learning_rate"):
        compose([f"--config-dir={tmp_path}", "optim=wrong"])


def test_no_shipped_file_names_python() -> None:
    for path in conf_dir().rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path
        assert "hydra" not in path.read_text(), path


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(experiment: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    words = [f"experiment={experiment}", *SMALL, "data=jsonl", f"data.path={rows}", "data.eval_fraction=0.2"]
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(
        [sys.executable, str(root / "train.py"), *words, "max_steps=2", f"run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DISTFT_CACHE": str(tmp_path / "cache")},
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    assert (tmp_path / "run" / "final").is_dir()


def attributes_of(source: str) -> Iterator[tuple[str, str]]:
    """(what it is read from, attribute) of every attribute that is read in a module: `run.optim.lr` -> (optim, lr)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            yield (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")), node.attr


def read_in_the_code() -> set[tuple[str, str]]:
    """What code reads; the rules over the schema are no readers."""
    package = Path(distft.__file__).parent
    files = [path for path in package.rglob("*.py") if "config" not in path.relative_to(package).parts]
    return {pair for path in files for pair in attributes_of(path.read_text(encoding="utf-8"))}


def unread(schema: type, read: set[tuple[str, str]]) -> list[str]:
    """Knobs that no code reads. A name that several sections share counts only where it is read from its section."""
    names = [knob.name for knob in knobs(schema)]
    shared = Counter(name.rpartition(".")[2] for name in names)
    fields = {field for _, field in read}
    missing = []
    for name in names:
        path, _, field = name.rpartition(".")
        owner = path.rpartition(".")[2]
        exact = (owner, field) in read if owner else any(field == found for _, found in read)
        if not exact and (shared[field] > 1 or field not in fields):
            missing.append(name)
    return missing


def test_every_knob_is_read() -> None:
    assert unread(Run, read_in_the_code()) == []
    assert unread(Generate, read_in_the_code()) == []
    assert unread(Verify, read_in_the_code()) == []
    assert unread(ReportOn, read_in_the_code()) == []
    assert unread(CheckedRun, read_in_the_code()) == []
    assert unread(DoctoredRun, read_in_the_code()) == []


def test_a_knob_that_nobody_reads_would_be_seen() -> None:
    """Negative control: the same scan, without the one place that reads a knob."""
    read = read_in_the_code()
    assert ("optim", "weight_decay") in read
    without = {pair for pair in read if pair[1] != "weight_decay"}
    assert unread(Run, without) == ["optim.weight_decay"]
    assert list(attributes_of("x = run.optim.lr\nrun.optim.eps = 3")) == [
        ("optim", "lr"),
        ("run", "optim"),
        ("run", "optim"),
    ]
