"""Bandwidth and latency of an all-reduce between every two ranks, and which link is the slow one.

Each pair has a process group of its own, so that a link that is dead fails alone. Rounds of pairs that have no rank in
common are measured side by side (the circle method of round-robin tournaments): all pairs of n ranks in n - 1 rounds.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.doctor.verdict import FAILS, OK, SKIPPED, WARN, Verdict, listed

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from distft.launch.topology import Place

MOST_RANKS = 64  # above that one rank a host is measured
SMALLEST, LARGEST = 4 << 10, 64 << 20  # bytes of a message
LONG_ENOUGH = 0.05  # seconds that the message takes by whose time a link is judged
PINGS = 20
FLOOR = 0.1e9  # bytes a second: less than gigabit Ethernet moves
SLOW_LATENCY, NOTICED_LATENCY = 10.0, 0.5e-3  # times the quicker pairs', and seconds more
QUICK = 0.75  # a pair is compared with the quickest quarter of its kind, since one slow host slows many pairs


@dataclass(frozen=True)
class Link:
    """What was measured between two ranks: bytes a second and seconds, or why it could not be."""

    first: int
    second: int
    bandwidth: float = 0.0
    latency: float = 0.0
    dead: str = ""


# --- which pairs, pure ----------------------------------------------------------------------------------------------


def rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every two of these ranks once, in rounds in which no rank has two partners."""
    table: list[int | None] = list(ranks)
    if len(table) % 2:
        table.append(None)
    found = []
    for _ in range(len(table) - 1):
        opposite = zip(table[: len(table) // 2], reversed(table), strict=False)
        found.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        table = [table[0], table[-1], *table[1:-1]]
    return found


def taking_part(places: Sequence[Place]) -> list[int]:
    """All ranks, or where that would be too many pairs the first one of each host."""
    if len(places) <= MOST_RANKS:
        return [place.rank for place in places]
    return [place.rank for place in places if place.local_rank == 0]


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(
    first: int, second: int, rank: int, store: Store, device: torch.device, seconds: float, wait: float
) -> Link:
    """What the link between two ranks does; called by both at once. A link that does not answer in `wait` s is dead."""
    from distft.doctor.bounded import why

    try:
        pair = Pair(store, rank == second, device, wait)
        pair.all_reduce(SMALLEST)
        latency = min(pair.all_reduce(8) for _ in range(PINGS))
        return Link(first, second, bandwidth(pair, seconds), latency)
    except RuntimeError as error:  # gloo's, NCCL's and the store's errors
        return Link(first, second, dead=why(error))


class Pair:
    """The group of two ranks. `index`: 0 or 1."""

    def __init__(self, store: Store, index: int, device: torch.device, wait: float) -> None:
        import torch
        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=wait)
        self.device, self.timeout = device, timeout
        self.group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(store, index, 2, options)
        else:
            self.group = dist.ProcessGroupGloo(store, index, 2, timeout)
        self.buffer = torch.zeros(LARGEST, dtype=torch.uint8, device=device)

    def all_reduce(self, num_bytes: int) -> float:
        """Seconds that it takes here."""
        import torch

        message = self.buffer[:num_bytes]
        started = time.perf_counter()
        self.group.allreduce([message]).wait(self.timeout)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def agreed(self, seconds: float) -> float:
        """The longer of both ranks' times, so that both go on alike."""
        import torch
        import torch.distributed as dist

        value = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        options = dist.AllreduceOptions()
        setattr(options, "reduceOp", dist.ReduceOp.MAX)  # noqa: B010 (its annotation is another type)
        self.group.allreduce([value], options).wait(self.timeout)
        return float(value)


def bandwidth(pair: Pair, seconds: float) -> float:
    """Bytes a second of messages that grow until one takes long enough; of that size then the quickest of several.

    Always the quickest: other work on a host makes a message late now and then, and nothing makes it early. A slow link
    is slow every time.
    """
    started, size = time.perf_counter(), SMALLEST

    def quickest(tries: int, enough: float) -> float:
        took = pair.agreed(pair.all_reduce(size))
        for _ in range(tries - 1):
            if took < enough or pair.agreed(time.perf_counter() - started + took) >= seconds:
                break
            took = min(took, pair.agreed(pair.all_reduce(size)))
        return took

    while (took := quickest(3, LONG_ENOUGH)) < LONG_ENOUGH and size < LARGEST:
        size = min(4 * size, LARGEST)
    return size / min(took, quickest(5, 0.0))


# --- judging, pure --------------------------------------------------------------------------------------------------


def judge(
    links: Sequence[Link], hosts: Sequence[str], factor: float, floor: float | None, backend: str
) -> list[Verdict]:
    """Verdicts over all pairs. `hosts`: of each rank. `factor`: how many times slower than the quick pairs is slow.

    Pairs of one host are compared with each other, and pairs between hosts. `floor`: bytes a second that every pair
    must move.
    """
    if not links:
        return [Verdict("links", SKIPPED, "one rank has no link (launch.ranks=2 tries two)")]
    found = [*judge_dead(links, hosts)]
    alive = [link for link in links if not link.dead]
    for between, kind in ((True, "between hosts"), (False, "inside a host")):
        chosen = [link for link in alive if (hosts[link.first] != hosts[link.second]) is between]
        if chosen:
            slow = judge_speed(chosen, hosts, factor, floor, kind)
            rates, delays = [link.bandwidth for link in chosen], [link.latency for link in chosen]
            pairs = f"{len(chosen)} pair{'s' * (len(chosen) > 1)} by {backend}"
            said = f"{kind}, {pairs}: {span(rates, rate)}, {span(delays, delay)}"
            found += slow or [Verdict("links", OK, said)]
    return found


def judge_dead(links: Sequence[Link], hosts: Sequence[str]) -> list[Verdict]:
    dead = [link for link in links if link.dead]
    if not dead:
        return []
    said = f"{blamed(dead, links, hosts)} without an answer ({dead[0].dead})"
    return [Verdict("links", FAILS, said, "Look at the firewall, and at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.")]


def judge_speed(
    links: Sequence[Link], hosts: Sequence[str], factor: float, floor: float | None, kind: str
) -> list[Verdict]:
    quick = quantile([link.bandwidth for link in links], QUICK)
    prompt = -quantile([-link.latency for link in links], QUICK)
    late = [link for link in links if link.latency > SLOW_LATENCY * prompt and link.latency - prompt > NOTICED_LATENCY]
    below = [link for link in links if floor is not None and link.bandwidth < floor]
    bound = quick / factor if quick >= FLOOR else FLOOR  # where none is quick there is nothing to compare with
    slow = [link for link in links if link not in below and link.bandwidth < bound]
    found = []
    if below and floor is not None:
        said = f"{blamed(below, links, hosts)}: {worst_rate(below)}, and doctor.min_bandwidth={floor / 1e9:g}"
        found.append(Verdict("links", FAILS, said, CURE))
    if slow:
        than = f"{quick / min(link.bandwidth for link in slow):.0f} times slower than the quick pairs {kind}"
        against = f"{than} ({rate(quick)})" if quick >= FLOOR else "less than gigabit Ethernet moves"
        found.append(Verdict("links", WARN, f"{blamed(slow, links, hosts)}: {worst_rate(slow)}, {against}", CURE))
    if late and not slow and not below:
        said = f"{blamed(late, links, hosts)}: an all-reduce takes {delay(max(link.latency for link in late))}"
        found.append(Verdict("links", WARN, f"{said}, of the quick pairs {kind} {delay(prompt)}", CURE))
    return found


CURE = (
    "Every step waits for it: look at its cable, card, switch port and interface (NCCL_SOCKET_IFNAME), or leave it out."
)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that is not above `share` of them, at least one of them."""
    return sorted(values)[math.ceil(share * (len(values) - 1))]


def worst_rate(links: Sequence[Link]) -> str:
    return span([link.bandwidth for link in links], rate)


def blamed(links: Sequence[Link], among: Sequence[Link], hosts: Sequence[str]) -> str:
    """The host or the rank whose links all of these are, and no other was measured of it; else the pairs."""
    for names in (hosts, [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]):
        for name in dict.fromkeys(names[end] for link in links for end in (link.first, link.second)):
            own = [link for link in among if name in (names[link.first], names[link.second])]
            if len(own) > 1 and set(own) == set(links):
                return f"all {len(own)} links of {name}"
    ordered = sorted(links, key=lambda link: link.bandwidth)
    told = [
        f"rank {a} on {hosts[a]} - rank {b} on {hosts[b]}" for a, b in ((link.first, link.second) for link in ordered)
    ]
    return f"the link{'s' * (len(told) > 1)} {listed(told)}"


def span(values: Sequence[float], show: Any) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def rate(value: float) -> str:
    return f"{value / 1e9:.2g} GB/s" if value >= 1e9 else f"{value / 1e6:.3g} MB/s"


def delay(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
