"""Whether hosts are fit for a run: a pure function of what they told (facts.py). All problems of all hosts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distft.launch.hostfile import Host

LARGEST_SKEW = 30.0  # seconds between a host's clock and the controller's: by clocks is told who failed first
LEAST_ROOM = 64 << 20  # bytes in a host's own temporary folder and in its memory file system

Facts = Mapping[str, Any]


def judge(hosts: Sequence[Host], told: Mapping[str, Facts], own: Facts, run_dir: str, cwd: str) -> list[str]:
    """Every problem of the hosts that answered.

    Args:
        told: by host what `facts.look_around` found there, with `skew`: seconds that its clock is ahead.
        own: the same of this machine, whose run it is.
    """
    problems = twins(hosts, told)
    with_gpus = [name for name, facts in told.items() if facts["gpus"]]
    for host in hosts:
        if host.name in told:
            facts = told[host.name]
            problems += [f"{host.name}: {problem}" for problem in of_one(host, facts, own, run_dir, cwd)]
            if with_gpus and not facts["gpus"]:
                problems.append(f"{host.name}: no GPU is seen there, but on {with_gpus[0]}. Look at nvidia-smi there.")
    return problems


def of_one(host: Host, facts: Facts, own: Facts, run_dir: str, cwd: str) -> list[str]:
    problems = different(facts, own)
    if not facts["sees"]:
        problems.append(
            f"run.dir={run_dir} is not seen there as it is here. Set run.dir to a folder of a file system that all "
            "hosts share."
        )
    elif facts["config"] != own["config"]:
        problems.append(f"{run_dir}/config.yaml differs from the one here. All hosts need one file system for run.dir.")
    if not facts["cwd"]:
        problems.append(f"there is no folder {cwd}, from which the run is started. Start it from a shared one.")
    if abs(facts["skew"]) > LARGEST_SKEW:
        way = "ahead of" if facts["skew"] > 0 else "behind"
        problems.append(
            f"its clock is {abs(facts['skew']):.0f} s {way} the one here, {LARGEST_SKEW:.0f} s are allowed. Set it by "
            "NTP (chronyc tracking)."
        )
    devices, kind = (facts["gpus"], "GPU") if facts["gpus"] else (facts["cores"], "CPU core")
    if max(host.slots) >= devices:
        have = f"{devices} {kind}{'' if devices == 1 else 's'}"
        problems.append(f"slot {max(host.slots)} is used (they count from 0), but it has {have}. Lower its slots.")
    problems += [
        f"{path} has {free / 1e6:.0f} MB free, {LEAST_ROOM / 1e6:.0f} MB are needed. Make room there."
        for path, free in sorted(facts["rooms"].items())
        if free < LEAST_ROOM
    ]
    return problems


def different(facts: Facts, own: Facts) -> list[str]:
    """Versions that are not those of this machine."""
    found = {"python": (facts["python"], own["python"])}
    found |= {name: (facts["versions"].get(name, "missing"), mine) for name, mine in own["versions"].items()}
    problems = [
        f"{name} is {there} there and {here} here. Install the same on all hosts."
        for name, (there, here) in found.items()
        if there != here
    ]
    if facts["code"] != own["code"]:
        problems.append("its distft has other sources than the one here. Bring both to the same commit.")
    return problems


def twins(hosts: Sequence[Host], told: Mapping[str, Facts]) -> list[str]:
    """One machine under two names would have its devices used twice."""
    first: dict[str, str] = {}
    problems = []
    for host in hosts:
        if host.name in told:
            other = first.setdefault(told[host.name]["machine"], host.name)
            if other != host.name:
                problems.append(f"{other} and {host.name} are one machine. Take one of them out of the hostfile.")
    return problems
