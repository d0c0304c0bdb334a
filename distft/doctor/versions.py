"""Which versions are installed, against the ranges that distft declares."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from distft.doctor.verdict import FAILS, SKIPPED, WARN, Verdict, listed, worst

SHOWN = ("distft", "torch", "transformers", "deepspeed", "peft", "datasets", "wandb")
CURE = "pip install -c constraints.txt -e . puts in what the tests ran with."


def look() -> list[Verdict]:
    try:
        wanted = [Requirement(text) for text in metadata.requires("distft") or []]
        python = str(metadata.metadata("distft").json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        found = ", ".join(f"{name} {version}" for name in SHOWN if (version := version_of(name)))
        said = f"distft runs from a checkout that is not installed, so its ranges are not known; found: {found}"
        return [Verdict("versions", SKIPPED, said, CURE)]
    installed = {requirement.name: version_of(requirement.name) for requirement in wanted}
    torch = util.find_spec("torch")
    bytecode = Path(torch.cached) if torch is not None and torch.cached else None
    return judge(wanted, installed, python, platform.python_version()) + compiled(bytecode, sys.dont_write_bytecode)


def compiled(bytecode: Path | None, never_written: bool) -> list[Verdict]:
    """A warning where every process compiles what it imports, as in many container images. `bytecode`: torch's own."""
    if not never_written or bytecode is None or bytecode.exists():
        return []
    said = "PYTHONDONTWRITEBYTECODE is set and torch has no bytecode: every rank compiles all that it imports"
    cure = f"Unset it, or once: python -m compileall -q {bytecode.parents[2]}. A rank then starts in half the time."
    return [Verdict("versions", WARN, said, cure)]


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def summary() -> dict[str, str]:
    """What has to be the same on every host."""
    found = {name: version_of(name) for name in SHOWN}
    return {"python": platform.python_version(), **{name: version or "-" for name, version in found.items()}}


def judge(
    wanted: Sequence[Requirement], installed: Mapping[str, str | None], python_range: str, python: str
) -> list[Verdict]:
    """What is missing or out of range. An extra's package counts only where it is installed, and then as a warning."""
    found = []
    if not SpecifierSet(python_range).contains(python):
        cure = f"Make the environment anew with a Python of {python_range}."
        found.append(Verdict("versions", FAILS, f"python {python} is not {python_range}", cure))
    for extra, state in ((False, FAILS), (True, WARN)):
        chosen = [requirement for requirement in wanted if ("extra" in str(requirement.marker or "")) is extra]
        wrong = [text for requirement in chosen if (text := problem(requirement, installed, extra))]
        if wrong:
            found.append(Verdict("versions", state, listed(list(dict.fromkeys(wrong)), 8), CURE))
    shown = {"distft": version_of("distft"), **installed}
    good = ", ".join([f"python {python}", *(f"{name} {shown[name]}" for name in SHOWN if shown.get(name))])
    return worst("versions", found, good)


def problem(requirement: Requirement, installed: Mapping[str, str | None], extra: bool) -> str:
    """What is wrong with one package; empty where nothing is."""
    if requirement.marker is not None and not extra and not requirement.marker.evaluate():
        return ""
    version = installed.get(requirement.name)
    if version is None:
        return "" if extra else f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"


def compare(reports: Mapping[str, Mapping[str, str]]) -> list[Verdict]:
    """Versions that differ between hosts, by the hosts' names."""
    differing = []
    for name in next(iter(reports.values())):
        hosts: dict[str, list[str]] = {}
        for host, versions in reports.items():
            hosts.setdefault(versions.get(name, "-"), []).append(host)
        if len(hosts) > 1:
            differing.append(f"{name} is {'; '.join(f'{version} on {listed(on)}' for version, on in hosts.items())}")
    if not differing:
        return []
    return [Verdict("same versions", FAILS, ", ".join(differing), f"Install the same on every host. {CURE}")]
