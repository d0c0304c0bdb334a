"""The look of one rank at its host, at its device and, together with the other ranks, at the links between them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.cache import cache_folder
from distft.config.load import whole_hash
from distft.config.schema.doctor import DoctoredRun
from distft.doctor import disk, kernels, limits, links, machine, services, trials, versions
from distft.doctor.bounded import bounded, why
from distft.doctor.together import Together
from distft.doctor.verdict import FAILS, OK, WARN, Verdict, as_dict, listed, merged
from distft.errors import Stop
from distft.launch.agree import connect
from distft.launch.topology import Place

if TYPE_CHECKING:
    from torch.distributed import Store

LEAVE_SECONDS = 3.0
SEE_SECONDS = 30.0  # network file systems cache the contents of folders


@dataclass
class Ranks:
    """Who came: of every rank its place and what has to be alike."""

    places: list[Place]
    labels: list[str]  # of each rank's host
    facts: dict[int, dict[str, Any]]

    @property
    def leaders(self) -> dict[int, str]:
        """The first rank of each host, and the host's name."""
        return {place.rank: label for place, label in zip(self.places, self.labels, strict=True) if leads(place)}


def leads(place: Place) -> bool:
    return place.local_rank == 0


def labels_of(places: Sequence[Place], hosts: Mapping[int, str]) -> list[str]:
    """The host of each rank, by its name; hosts of one name (containers) also by their first rank."""
    first = {place.rank: max(0, place.rank - place.local_rank) for place in places}
    names: dict[str, set[int]] = {}
    for place in places:
        names.setdefault(hosts.get(place.rank, "?"), set()).add(first[place.rank])
    return [
        f"{name} (rank {first[place.rank]})" if len(names[name]) > 1 else name
        for place in places
        for name in [hosts.get(place.rank, "?")]
    ]


@dataclass
class Examination:
    """One rank's."""

    run: DoctoredRun
    place: Place
    checks: Sequence[str]
    found: list[Verdict] = field(default_factory=list)
    together: Together | None = field(default=None, init=False)  # once all ranks have been heard of

    def all(self) -> tuple[list[Verdict], str]:
        """Look, alone or with the other ranks. Returns on rank 0 the verdicts of all of them, and who was looked at."""
        if self.place.size == 1:
            self.own()
            if "links" in self.checks:
                self.found += links.judge([], [], 1.0, None, "")
            return self.found, f"one rank on {self.place.host}"
        try:
            together, ranks = self.meet()
        except (Stop, RuntimeError) as error:
            self.own()
            said = str(error) if isinstance(error, Stop) else why(error)
            return [Verdict("ranks", FAILS, said, "Look at the output of the other hosts."), *self.found], "ranks apart"
        self.own()
        return self.with_others(together, ranks)

    def agreed(self, code: int) -> int:
        """The exit code of rank 0, at every rank that can still hear it."""
        together, place = self.together, self.place
        if together is None:
            return code
        try:
            if not place.is_main:
                code = int(together.take("code"))
                together.put(f"left/{place.rank}", "")
                return code
            together.put("code", code)
            for rank in range(1, place.size):  # the store ends with this process
                together.take(f"left/{rank}", LEAVE_SECONDS)
        except RuntimeError:
            return code
        return code

    # --- alone ------------------------------------------------------------------------------------------------------

    def own(self) -> None:
        """What this rank can tell by itself: of its host where it is the first one there, of its GPU always."""
        import torch

        if leads(self.place):
            for what, (name, check, state) in self.of_host().items():
                if name in self.checks:
                    self.found += bounded(what, check, self.run.doctor.seconds, state)
        if "kernels" in self.checks and (leads(self.place) or torch.cuda.is_available()):
            self.found += kernels.look(self.needed_kernels(), self.run.doctor.seconds)

    def of_host(self) -> dict[str, tuple[str, Callable[[], list[Verdict]], str]]:
        """What is said to be looked at: the check it belongs to, the look, and how bad it is if that fails."""
        run, size = self.run, self.place.size
        local_size = self.place.local_size or 1
        places = [
            disk.Place("run folder", "run.dir", self.folder()),
            disk.Place("cache", "data.cache_dir", cache_folder(run.data)),
            disk.Place("scratch", "TMPDIR", Path(tempfile.gettempdir())),
        ]
        return {
            "versions": ("versions", versions.look, FAILS),
            "devices": ("devices", partial(machine.look, local_size), FAILS),
            "limits": ("limits", partial(limits.look, local_size, size), FAILS),
            "programs": (
                "programs",
                partial(machine.programs, run.launch.target, run.launch.engine, run.model.compile),
                FAILS,
            ),
            "disk": ("disk", partial(disk.look, places), FAILS),
            "tracker": ("tracker", partial(services.tracker, run.log.tracker), WARN),
            "hub": ("hub", services.hub, WARN),
        }

    def folder(self) -> Path:
        """Where the run folder will be made."""
        return disk.existing(Path(self.run.run.dir or "runs"))

    def needed_kernels(self) -> list[str]:
        run = self.run
        wanted = [*trials.ALWAYS]
        wanted += ["torch.compile"] * run.model.compile + ["liger-kernel"] * (run.model.kernels == "liger")
        return wanted + ["deepspeed"] * run.strategy.name.startswith("zero")

    # --- with the others --------------------------------------------------------------------------------------------

    def meet(self) -> tuple[Together, Ranks]:
        """
        Raises:
            Stop, RuntimeError: rank 0 cannot be reached.
        """
        place, wait = self.place, self.run.launch.start_timeout
        together = Together(place, connect(place, wait), wait)
        facts = {
            "host": place.host,
            "local_rank": place.local_rank,
            "local_size": place.local_size,
            "versions": versions.summary(),
            "config": whole_hash(self.run),
        }
        told = together.everyone("here", facts)
        places = [
            Place(rank, place.size, told[rank]["local_rank"] if rank in told else 0, 0) for rank in range(place.size)
        ]
        labels = labels_of(places, {rank: facts["host"] for rank, facts in told.items()})
        return together, Ranks(places, labels, told)

    def with_others(self, together: Together, ranks: Ranks) -> tuple[list[Verdict], str]:
        missing = [str(rank) for rank in range(self.place.size) if rank not in ranks.facts]
        leaders = ranks.leaders
        hosts = list(dict.fromkeys(ranks.labels))
        who = f"{self.place.size} ranks on {listed(hosts)}"
        common: list[Verdict] = []
        if missing:
            waited = f"launch.start_timeout={together.seconds:g} s"
            said = f"{listed(missing)} of {self.place.size} did not come within {waited}"
            common.append(Verdict("ranks", FAILS, said, "Look at the output of their hosts."))
        else:
            common += compare(ranks)
            self.together = together
            # Others may still be looking at themselves, each check for as long as it is given.
            together.seconds = self.run.doctor.seconds * (len(self.of_host()) + len(trials.TRIALS))
            for name, exchange in self.exchanges(together, ranks).items():
                try:
                    common += exchange()
                except (RuntimeError, OSError) as error:
                    common.append(Verdict(name, FAILS, why(error), "Look at the output of the other hosts."))
        reports = together.everyone("found", [as_dict(verdict) for verdict in self.found])
        if not self.place.is_main:
            return [], who
        by_host: dict[str, list[Verdict]] = {hosts[0]: []}
        for rank, verdicts in reports.items():
            name = ranks.labels[rank] if rank in leaders else f"rank {rank} on {ranks.labels[rank]}"
            told = [Verdict(**verdict) for verdict in verdicts]
            if rank in leaders or told:
                by_host.setdefault(name, []).extend(told)
        return [*merged(by_host), *common], who

    def exchanges(self, together: Together, ranks: Ranks) -> dict[str, Callable[[], list[Verdict]]]:
        """What all ranks do together, in this order."""
        leaders = ranks.leaders
        found: dict[str, Callable[[], list[Verdict]]] = {"ready": partial(ready, together)}
        if "clock" in self.checks and len(leaders) > 1:
            found["clock"] = partial(together.clock, leaders)
        if "disk" in self.checks and len(leaders) > 1:
            found["shared"] = partial(together.shared, self.folder(), leaders, SEE_SECONDS)
        if "links" in self.checks:
            found["links"] = partial(self.pairs, together, ranks)
        return found

    def pairs(self, together: Together, ranks: Ranks) -> list[Verdict]:
        """Every pair in its round; rank 0 judges what the first of each pair has measured."""
        from distft.world import device_for

        doctor, store, device = self.run.doctor, together.store, device_for(self.place.local_rank)
        chosen = links.taking_part(ranks.places)
        measured = []
        if self.place.rank in chosen:
            measured = measure_all(
                chosen, self.place.rank, store, device, doctor.link_seconds, doctor.seconds, together
            )
        told = together.everyone("links", measured)
        floor = None if doctor.min_bandwidth is None else doctor.min_bandwidth * 1e9
        every = [links.Link(**link) for rank in sorted(told) for link in told[rank]]
        backend = "nccl" if device.type == "cuda" else "gloo"
        return links.judge(every, ranks.labels, doctor.slow_link, floor, backend) if self.place.is_main else []


def ready(together: Together) -> list[Verdict]:
    """All have looked at themselves: what follows is measured on quiet hosts."""
    together.side_by_side("ready", together.place.size, together.seconds)
    return []


def measure_all(
    chosen: Sequence[int],
    rank: int,
    store: Store,
    device: Any,
    seconds: float,
    wait: float,
    together: Together,
) -> list[dict[str, Any]]:
    """This rank's part in every round; returns the links of which it is the first rank."""
    import torch.distributed as dist

    measured = []
    for number, pairs in enumerate(links.rounds(chosen)):
        together.side_by_side(f"round/{number}", len(chosen), 4 * wait)
        for first, second in pairs:
            if rank in (first, second):
                own = dist.PrefixStore(f"pair/{first}/{second}", store)
                link = links.measure(first, second, rank, own, device, seconds, wait)
                measured += [vars(link)] if rank == first else []
    return measured


def compare(ranks: Ranks) -> list[Verdict]:
    """What has to be the same on every host, told by the hosts' names."""
    by_host = {ranks.labels[rank]: ranks.facts[rank] for rank in ranks.leaders}
    if len(by_host) == 1:
        return []
    found = versions.compare({host: facts["versions"] for host, facts in by_host.items()})
    hashes = {facts["config"] for facts in by_host.values()}
    if len(hashes) > 1:
        other = [host for host, facts in by_host.items() if facts["config"] != by_host[ranks.labels[0]]["config"]]
        said = f"{listed(other)} read another configuration than {ranks.labels[0]}"
        found.append(Verdict("same configuration", FAILS, said, "Give all hosts the same words and the same conf/."))
    return found or [Verdict("same everywhere", OK, f"versions and configuration of {len(by_host)} hosts")]
