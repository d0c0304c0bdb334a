"""Start the ranks again after a crash: whether, how many of them, when, and from where."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distft import errors
from distft.config.schema import Run
from distft.launch.stop import Signals
from distft.launch.watch import Ending, say

LONGEST_WAIT = 60.0  # seconds before a restart, unless launch.restart_seconds is longer
CALM_SECONDS = 600.0  # a start that lasted so long was well: the waits begin anew
PORT_TRIES = 5
STEP = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Crash:
    """One start of the ranks that ended in a crash or a stall."""

    places: Mapping[str, int]  # ranks by host that were started
    step: int  # of the newest checkpoint at that time, 0 without one
    seconds: float  # that the ranks ran
    host: str | None  # of the rank that failed first, None where that is not known

    @property
    def size(self) -> int:
        return sum(self.places.values())


@dataclass(frozen=True)
class Again:
    places: Mapping[str, int]
    wait: float  # seconds


@dataclass(frozen=True)
class GiveUp:
    reason: str


def decide(
    crashes: Sequence[Crash],
    available: Mapping[str, int],
    max_restarts: int,
    min_ranks: int | None,
    restart_seconds: float,
    fits: Callable[[int], bool] = lambda size: True,
) -> Again | GiveUp:
    """What follows the last of `crashes`, those of one launch in order.

    Args:
        available: ranks that can be started now, by host.
        min_ranks: how few may go on; None: as many as before.
        fits: whether the strategy takes that number of ranks.
    """
    last = crashes[-1]
    if len(crashes) > max_restarts:
        return GiveUp(f"launch.max_restarts={max_restarts} is used up")
    least = last.size if min_ranks is None else min_ranks
    places = {host: min(count, available.get(host, 0)) for host, count in last.places.items()}
    if len(crashes) > 1 and last.step <= crashes[-2].step:
        stuck = f"no checkpoint was written between the last two crashes (the newest is of step {last.step})"
        if min_ranks is None or last.size <= min_ranks or last.host is None or last.host not in last.places:
            return GiveUp(stuck)
        if sum(places.values()) == last.size:  # else it is plain what was missing
            places = without(places, last.host)
    places = {host: count for host, count in places.items() if count}
    while places and not fits(sum(places.values())):
        places = without_one(places, next(reversed(places)))
    size = sum(places.values())
    if size < max(1, least):
        return GiveUp(f"{size} of {last.size} ranks can be started again, and launch.min_ranks={least} are needed")
    return Again(places, wait(crashes, restart_seconds))


def without(places: Mapping[str, int], host: str) -> dict[str, int]:
    """Fewer ranks after `host` failed again: the other hosts, or one rank less where there is no other."""
    others = {name: count for name, count in places.items() if name != host}
    return others or without_one(places, host)


def without_one(places: Mapping[str, int], host: str) -> dict[str, int]:
    return {name: count - (name == host) for name, count in places.items() if count > (name == host)}


def wait(crashes: Sequence[Crash], first: float) -> float:
    """Seconds before the next start: doubled with each crash since the last start that lasted."""
    in_a_row = 0
    for crash in reversed(crashes):
        in_a_row += 1
        if crash.seconds >= CALM_SECONDS:
            break
    return min(first * 2.0 ** (in_a_row - 1), max(first, LONGEST_WAIT))


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one; whether it is sound the ranks find out."""
    return max((int(path.parent.name.removeprefix("step-")) for path in manifests(run_dir)), default=0)


def manifests(run_dir: Path) -> list[Path]:
    """Of every complete checkpoint."""
    return [path for path in (run_dir / "checkpoints").glob("step-*/manifest.json") if STEP.fullmatch(path.parent.name)]


Places = Mapping[str, int]  # ranks by host
Attempt = Callable[[Places, str | None], Ending]  # where, what to resume -> how it ended


def keep_running(
    run: Run,
    run_dir: Path,
    places: Places,
    resume: str | None,
    attempt: Attempt,
    signals: Signals,
    deadline: float | None,
    available: Callable[[], Places],
) -> Ending:
    """Start the ranks until they end well, are to end, or it is of no use.

    Args:
        places: where ranks are to run at first.
        available: how many ranks can be started now, by host; asked after a crash.
        resume: a checkpoint or run folder that is not written in the snapshot.
        deadline: seconds since 1970 after which nothing is started again.

    Returns:
        how the last start ended.
    """
    crashes: list[Crash] = []
    while True:
        began = time.monotonic()
        ended = on_a_free_port(attempt, places, resume, signals)
        if ended.code not in (errors.BUG, errors.STALLED) or signals.received or not run.launch.max_restarts:
            return ended
        culprit = ended.cause.host if ended.cause else None
        crashes.append(Crash(places, newest_checkpoint(run_dir), time.monotonic() - began, culprit))
        follows = what_follows(run, crashes, available(), deadline)
        note(run_dir, ended, crashes, follows)
        if isinstance(follows, GiveUp):
            say(f"Not started again: {follows.reason}. When the cause is mended: resume={run_dir}.")
            return ended
        if wrote_checkpoints(run_dir):  # then this launch goes on from its own, whatever it was to resume
            resume = str(run_dir)
        tell(follows, crashes, run.launch.max_restarts)
        places = follows.places
        if not rest(follows.wait, signals):
            return Ending(errors.SAVED_AFTER_SIGNAL, None, "Stopped by a signal between two starts.")


def what_follows(
    run: Run, crashes: Sequence[Crash], available: Mapping[str, int], deadline: float | None
) -> Again | GiveUp:
    launch, shard_size = run.launch, run.strategy.shard_size
    follows = decide(
        crashes,
        available,
        launch.max_restarts,
        launch.min_ranks,
        launch.restart_seconds,
        lambda ranks: not isinstance(shard_size, int) or ranks % shard_size == 0,
    )
    if isinstance(follows, Again) and deadline is not None and time.time() + follows.wait >= deadline:
        return GiveUp("the deadline is over")
    return follows


def tell(again: Again, crashes: Sequence[Crash], max_restarts: int) -> None:
    last, size = crashes[-1], sum(again.places.values())
    start = f"step {last.step}" if last.step else "the beginning"
    ranks = f" with {size} rank{'s' if size > 1 else ''}" if again.places != last.places else ""
    say(f"Restart {len(crashes)} of {max_restarts} from {start}{ranks} in {again.wait:g} s.")


def wrote_checkpoints(run_dir: Path) -> bool:
    """Whether a checkpoint is younger than the launch, which wrote config.yaml on the same disk."""
    since = (run_dir / "config.yaml").stat().st_mtime
    return any(path.stat().st_mtime >= since for path in manifests(run_dir))


def on_a_free_port(attempt: Attempt, places: Places, resume: str | None, signals: Signals) -> Ending:
    """Try again, on another port, where somebody took it between the choice and the start."""
    for _ in range(PORT_TRIES - 1):
        ended = attempt(places, resume)
        if not port_taken(ended) or signals.received:
            return ended
        say("The port that was chosen is taken; another one is tried.")
    return attempt(places, resume)


def port_taken(ended: Ending) -> bool:
    cause = ended.cause
    return cause is not None and cause.failure is not None and cause.failure.type == "PortTaken"


def rest(seconds: float, signals: Signals) -> bool:
    """Wait. Returns False as soon as a signal asks for the end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals.received:
        time.sleep(min(0.1, max(0.0, until - time.monotonic())))
    return not signals.received


def note(run_dir: Path, ended: Ending, crashes: Sequence[Crash], next_step: Again | GiveUp) -> None:
    """A line of logs/restarts.jsonl."""
    last = crashes[-1]
    record = {
        "time": time.time(),
        "restart": len(crashes) if isinstance(next_step, Again) else None,
        "cause": ended.sentence,
        "rank": ended.cause.rank if ended.cause else None,
        "host": last.host,
        "step": last.step,
        "seconds": round(last.seconds, 3),
        "ranks": sum(next_step.places.values()) if isinstance(next_step, Again) else None,
        "gave_up": next_step.reason if isinstance(next_step, GiveUp) else None,
    }
    with (run_dir / "logs" / "restarts.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
