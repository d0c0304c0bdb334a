"""The import contracts of pyproject.toml hold, each of them can fail, and the controller starts without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "wandb")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_contracts_hold() -> None:
    finished = lint(ROOT)
    assert finished.returncode == 0, finished.stdout
    assert "0 broken" in finished.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("errors.py", "import distft.world", "A room imports only rooms below it"),
        ("evaluation/loss.py", "def late():\n    import distft.checkpoint", "A room imports only rooms below it"),
        ("novelty.py", "", "A room imports only rooms below it"),
        ("verbs/train.py", "import distft.verbs.preflight", "No verb imports another"),
        ("config/check.py", "import torch", "The schema and the rules over it need no heavy library"),
    ],
    ids=["upward", "sideways and late", "a room that is not on the map", "between verbs", "torch in the schema"],
)
def test_a_wrong_import_breaks_its_contract(tmp_path: Path, file: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "distft", tmp_path / "distft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "distft" / file).open("a") as module:
        module.write(f"\n{line}\n")
    finished = lint(tmp_path)
    assert finished.returncode == 1
    assert f"{broken} BROKEN" in finished.stdout


def loaded_by(module: str) -> set[str]:
    """The heavy libraries that importing `module` loads."""
    code = f"import {module}, sys; print(*set({HEAVY!r}).intersection(sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())


CONTROLLER = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("cli.py", "config/**/*.py", "launch/*.py")
    for path in (ROOT / "distft").glob(pattern)
    if path.name != "__init__.py"
)


def test_the_controller_starts_without_torch() -> None:
    assert {"distft.cli", "distft.config.load", "distft.launch.start"} <= set(CONTROLLER)
    assert loaded_by(", ".join(CONTROLLER)) == set()
    assert "torch" in loaded_by("distft.loop")
