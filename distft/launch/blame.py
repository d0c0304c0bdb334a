"""Which rank holds a run up, and the one sentence that says so: a pure function of what the ranks' heartbeats show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from distft.heartbeat import Beat

STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, "gone")


@dataclass(frozen=True)
class Patience:
    """Seconds in which a rank has to move: `step` in training; `start` until the run has gone through its first step
    (downloads, weights, compilation) and while a rank closes, where the tracker may still send."""

    step: float
    start: float

    def of(self, beat: Beat, steps: int | None = None) -> float:
        """`steps`: begun by the rank that has begun most, where that is known: what is told of others may be old."""
        steps = beat.steps if steps is None else steps
        return max(self.step, self.start) if steps < 2 or beat.phase == "closing" else self.step


def sentence(beats: Sequence[Beat], patience: Patience, now: float, missing: Sequence[int] = ()) -> str | None:
    """Who stands still and what the others wait for, or None: nobody does, or whoever does is waited for by nobody.

    A rank that merely waits is never named: named is one that is stopped or gone, else the one that has started the
    fewest collectives, and among equals the one that is least far in the program. Where that rank still moves, as in
    an evaluation that goes on, nothing is said, however long the others have waited.

    Args:
        beats: one of each rank that could be seen.
        now: the wall clock, from which "since" is told.
        missing: ranks of which nothing was ever seen.
    """
    steps = max((beat.steps for beat in beats), default=0)
    late = [beat for beat in beats if not beat.ended and beat.age > patience.of(beat, steps)]
    if not late:
        return None
    if missing:
        shown = f"rank {missing[0]}" if len(missing) == 1 else f"{len(missing)} ranks, the first of them {missing[0]},"
        return f"Nothing was ever seen of {shown}{waiting([beat for beat in beats if not beat.ended])}."
    named = dead_of(beats, late) or behind_of(beats)
    others = [beat for beat in beats if beat not in named and not beat.ended]
    if any(not beat.ended and beat not in late for beat in named):
        return None
    if not all(beat.answers or beat.state for beat in named) and any(beat not in late for beat in others):
        return None  # no news from another host, and yet the rest of the run goes on: it is the news that are held up
    return told(sorted(named, key=lambda beat: beat.rank), sorted(others, key=lambda beat: beat.rank), now)


def dead_of(beats: Sequence[Beat], late: Sequence[Beat]) -> list[Beat]:
    return [beat for beat in late if beat.state in STOPPED] or [
        beat for beat in beats if beat.state in GONE and not beat.ended
    ]


def behind_of(beats: Sequence[Beat]) -> list[Beat]:
    """The ranks that are least far. All of them where there is no difference."""
    fewest = min(beat.num_collectives for beat in beats)
    last = [beat for beat in beats if beat.num_collectives == fewest]
    if len(last) == len(beats) and (left_out := [beat for beat in beats if leaves_out(beat, beats)]):
        return left_out
    first = min(beat.number for beat in last)
    last = [beat for beat in last if beat.number == first]
    return [beat for beat in last if not beat.answers] or last


def leaves_out(beat: Beat, beats: Sequence[Beat]) -> bool:
    """Whether a rank is further than another in the program and has yet not started one of that one's collectives."""
    return any(
        beat.number > other.number
        and any(mine < theirs for mine, theirs in zip(beat.collectives, other.collectives, strict=False))
        for other in beats
    )


def told(named: list[Beat], others: list[Beat], now: float) -> str:
    one = max(named, key=lambda beat: beat.age)
    since = f"since {time.strftime('%H:%M:%S', time.localtime(now - one.age))} ({one.age:.0f} s)"
    who, several = ranks(named), len(named) > 1
    disk = (
        ", and its process waits for a disk or a network file system" if one.state == psutil.STATUS_DISK_SLEEP else ""
    )
    here = f"{place(one)} {since}{at(one)}{disk}"
    if one.state in STOPPED:
        by = "a debugger" if one.state == psutil.STATUS_TRACING_STOP else "SIGSTOP"
        said = f"{who} {'are' if several else 'is'} stopped ({by}) in {place(one)} {since}"
    elif one.state in GONE or one.ended:
        said = f"{who} {'have' if several else 'has'} ended in {place(one)}, {one.age:.0f} s ago"
    elif not one.answers:
        cause = "the interpreter is held" if one.state else "stopped, or the host is down or cut off"
        said = f"{who} {'give' if several else 'gives'} no sign of life {since}, last seen in {place(one)}: {cause}"
    elif one.phase == "data":
        waits = "wait for their" if several else "waits for its"
        said = f"{who} {waits} own data of step {one.step} {since}{at(one)}{disk}"
    elif not others and several:
        said = (
            f"{who} all stand after collective number {one.num_collectives}, in {here}: what connects them does not "
            "carry the next one, or a step takes longer than guard.stall_seconds"
        )
    elif not others:
        said = f"{who} has not moved in {here}"
    else:
        did = "left out" if any(leaves_out(one, [other]) for other in others) else "not joined"
        number = furthest(others).num_collectives
        said = f"{who} {'have' if several else 'has'} {did} collective number {number}, in {here}"
    return said + waiting(others) + "."


def waiting(others: list[Beat]) -> str:
    """What the rest of the ranks do meanwhile: that of the one that is furthest stands for all."""
    if not others:
        return ""
    one = furthest(others)
    who = f"rank {one.rank} waits" if len(others) == 1 else f"the other {len(others)} ranks wait"
    return f"; {who} for it in collective number {one.num_collectives}, {place(one)}{at(one)}"


def furthest(beats: Sequence[Beat]) -> Beat:
    return max(beats, key=lambda beat: (beat.num_collectives, beat.number))


def place(beat: Beat) -> str:
    return f"phase {beat.phase} of step {beat.step}" if beat.step else f"phase {beat.phase}"


def at(beat: Beat) -> str:
    return f" (at {beat.where})" if beat.where else ""


def ranks(named: list[Beat]) -> str:
    if len(named) == 1:
        return f"Rank {named[0].rank} (process {named[0].pid}) on {named[0].host}"
    shown = ", ".join(str(beat.rank) for beat in named[:8])
    return f"Ranks {shown}{', …' if len(named) > 8 else ''} on {hosts(named)}"


def hosts(named: Sequence[Beat]) -> str:
    names = sorted({beat.host for beat in named})
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more hosts" if len(names) > 4 else "")
