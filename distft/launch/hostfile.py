"""The hosts of a run: DeepSpeed's hostfile, its include and exclude filters, and which rank goes where. All of it pure.

https://www.deepspeed.ai/getting-started/#resource-configuration-multi-node
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distft.config.words import nearest
from distft.errors import UserMistake
from distft.launch.topology import checked_host

LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
SLOTS = re.compile(r"\d+(?:,\d+)*")


@dataclass(frozen=True)
class Host:
    """A host and its slots that are used: one rank each, numbers of its GPUs where it has any."""

    name: str
    slots: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{','.join(map(str, self.slots))}"


def parse_hostfile(text: str, name: str) -> tuple[dict[str, int], list[str]]:
    """Slots by host, and every problem of the file `name`."""
    found: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line, where = line.strip(), f"{name}, line {number}"
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            problems.append(f"{where}: {line[:80]!r} is no host. Write it as `{line.split()[0][:60]} slots=8`.")
            continue
        host, slots = match.group(1), int(match.group(2))
        try:
            checked_host(host)
        except UserMistake as mistake:
            problems.append(f"{where}: {mistake}")
            continue
        if host in found:
            problems.append(f"{where}: {host} is there twice. Give it one line with all its slots.")
        elif not slots:
            problems.append(f"{where}: {host} has no slots. Give it one a GPU, or take the line out.")
        found[host] = slots
    if not found and not problems:
        problems.append(f"{name} names no host. Write one a line, such as `node01 slots=8`.")
    return found, problems


def parse_filter(text: str, hosts: Mapping[str, int], knob: str) -> tuple[dict[str, set[int]], list[str]]:
    """Slots by host of `host1@host2:0,2`, in DeepSpeed's syntax, and every problem of it."""
    named: dict[str, set[int]] = {}
    problems: list[str] = []
    for part in text.split("@"):
        host, _, listed = (part, "", "") if part in hosts else part.rpartition(":")
        host = host or part
        if host not in hosts:
            near = nearest(host, list(hosts))
            meant = f" Did you mean {near}?" if near else f" It has {', '.join(list(hosts)[:8])}."
            problems.append(f"{knob}={text}: {host!r} is not in the hostfile.{meant}")
        elif listed and not SLOTS.fullmatch(listed):
            problems.append(f"{knob}={text}: {listed!r} is no list of slots. Write {host}:0,2.")
        else:
            slots = {int(slot) for slot in listed.split(",")} if listed else set(range(hosts[host]))
            if beyond := sorted(slot for slot in slots if slot >= hosts[host]):
                last = hosts[host] - 1
                problems.append(f"{knob}={text}: {host} has no slot {beyond[0]}, its slots are 0 to {last}.")
            named.setdefault(host, set()).update(slots)
    return named, problems


def choose(
    hosts: Mapping[str, int], include: str | None, exclude: str | None, ranks: int | str
) -> tuple[list[Host], list[str]]:
    """The hosts of a run in the order of the hostfile, `ranks` slots in all (auto: every one), and every problem."""
    if include and exclude:
        return [], ["launch.include and launch.exclude are two ways to say the same. Give one of the two."]
    filters, knob = (include, "launch.include") if include else (exclude, "launch.exclude")
    named, problems = parse_filter(filters, hosts, knob) if filters else ({}, [])
    kept: list[Host] = []
    for name, count in hosts.items():
        slots = set(range(count))
        if include:
            slots = named.get(name, set())
        elif exclude:
            slots -= named.get(name, set())
        if slots:
            kept.append(Host(name, tuple(sorted(slots))))
    if problems:
        return [], problems
    if not kept:
        return [], [f"{knob}={filters} leaves no slot of the hostfile. Take a host out of it."]
    total = sum(len(host.slots) for host in kept)
    if isinstance(ranks, int) and ranks > total:
        return [], [
            f"launch.ranks={ranks} is more than the {total} slots of {told(kept)}. Lower it, or give more hosts."
        ]
    return limited(kept, total if ranks == "auto" else int(ranks)), []


def limited(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """The first `ranks` slots; hosts that none is left for are not used."""
    kept: list[Host] = []
    for host in hosts:
        slots = host.slots[: max(0, ranks - sum(len(other.slots) for other in kept))]
        if slots:
            kept.append(Host(host.name, slots))
    return kept


def at(hosts: Sequence[Host], places: Mapping[str, int]) -> list[Host]:
    """The same hosts with `places` slots each; those with none are left out."""
    return [Host(host.name, host.slots[: places[host.name]]) for host in hosts if places.get(host.name)]


def ranks_of(hosts: Sequence[Host]) -> dict[str, range]:
    """The ranks of each host: in order, host by host."""
    found, first = {}, 0
    for host in hosts:
        found[host.name] = range(first, first + len(host.slots))
        first += len(host.slots)
    return found


def told(hosts: Sequence[Host]) -> str:
    """Names for a sentence, the first eight."""
    names = [host.name for host in hosts]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def rendered(hosts: Sequence[Host]) -> str:
    """A hostfile for DeepSpeed's launcher, which is given the slots themselves by `include_of`."""
    return "".join(f"{host.name} slots={max(host.slots) + 1}\n" for host in hosts)


def include_of(hosts: Sequence[Host]) -> str:
    return "@".join(map(str, hosts))
