"""An installed wheel is whole: the package, its configuration, the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "multirun", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    (path,) = folder.glob("distft-*.whl")
    return path


def test_a_wheel_holds_the_package_and_its_configuration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "distft").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"distft/{path.relative_to(ROOT).as_posix()}" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"distft"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_composes_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    code = (
        "from distft.config.load import compose, conf_dir; import distft; "
        "print(conf_dir()); print(compose(['optim.lr=1e-3', 'strategy=fsdp']).run.optim.lr); print(distft.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    package = site / "distft"
    assert finished.stdout.splitlines() == [str(package / "conf"), "0.001", str(package / "__init__.py")]
    command = [str(site / "bin" / "distft"), "train", "optim.lr=1e-3", "--cfg", "job"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "lr: 0.001" in shown.stdout
