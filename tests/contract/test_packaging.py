"""What is declared is what is used: ranges, pins, and a wheel that is whole."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OPTIONAL = {"flash-attn", "liger-kernel", "bitsandbytes"}  # in no pinned environment


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def declared(wheel: Path) -> list[Requirement]:
    """Every requirement of the wheel, those of the extras too."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    return [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]


def imported(paths: Iterable[Path]) -> set[str]:
    """Top-level names of the packages that these modules import."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"distft", "tests"}


@functools.cache
def installed() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def distributions(package: str) -> set[str]:
    known = {"flash_attn": {"flash-attn"}, "liger_kernel": {"liger-kernel"}, "bitsandbytes": {"bitsandbytes"}}
    known["triton"] = {"torch"}  # comes with its builds for CUDA
    found = installed().get(package, [])
    return {canonicalize_name(name) for name in found} or known.get(package, {package})


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
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"distft", "hydra_plugins"}
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


def test_every_pin_lies_in_its_range(wheel: Path) -> None:
    requirements = declared(wheel)
    assert len(requirements) > 25
    pinned = pins()
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name not in OPTIONAL:
            assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow {pinned[name]}"
    assert not Requirement("torch>=2.11,<2.14").specifier.contains("2.14.0")


def test_every_import_is_declared(wheel: Path) -> None:
    names = {canonicalize_name(requirement.name) for requirement in declared(wheel)}
    product = imported([*(ROOT / "distft").rglob("*.py"), ROOT / "train.py"])
    assert {"torch", "hydra", "wandb"} <= product
    assert {package for package in product if not distributions(package) & names} == set()
    assert distributions("requests") & names == set()  # here, since others need it, but not ours to use
