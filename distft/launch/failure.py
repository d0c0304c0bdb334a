"""Which rank failed first, and why: from what dying ranks write down and from how their processes ended.

A peer of a dead rank fails within milliseconds, so the order of the ends says little. A rank that dies by an exception
therefore leaves `logs/rank-N.failure.json`, which tells whether the exception is about another rank; one that is
killed leaves none.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distft import errors
from distft.config.redact import redact
from distft.errors import Stalled, Stop
from distft.launch.stop import STOP_SIGNALS, name_of

DELIBERATE = (
    errors.USER_MISTAKE,
    errors.NEGATIVE_VERDICT,
    errors.STOPPED_BY_GUARD,
    errors.STALLED,
    errors.SAVED_AFTER_SIGNAL,
)
LONGEST_MESSAGE = 2000  # characters
# gloo's, NCCL's and c10d's words for a peer that is gone or silent; most of it comes as a bare RuntimeError.
PEER_IS_GONE = (
    "closed by peer",
    "reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to recv",
    "recvValue failed",
    "Timed out waiting",
    "timed out",
    "timeout",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "process group has been destroyed",
)
PEER_IS_GONE_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "Elsewhere")


@dataclass(frozen=True)
class Failure:
    """What a rank that died by an exception wrote down."""

    rank: int
    host: str
    time: float  # seconds since 1970, by the clock of `host`
    type: str
    message: str
    where: str  # the innermost line of distft's own code, or of any
    exit_code: int
    follows: bool  # it tells of another rank's end or silence

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        return cls(
            rank=rank,
            host=socket.gethostname(),
            time=time.time(),
            type=type(error).__name__,
            message=redact(str(error).strip()[:LONGEST_MESSAGE]),
            where=innermost(error),
            exit_code=error.exit_code if isinstance(error, Stop) else errors.BUG,
            follows=is_about_a_peer(error),
        )

    def write(self, run_dir: Path) -> None:
        """Best effort: a rank that dies because the disk is full still has to die."""
        path = path_of(run_dir, self.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError:
            return


def path_of(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.failure.json"


def read(run_dir: Path, rank: int) -> Failure | None:
    try:
        return Failure(**json.loads(path_of(run_dir, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget(run_dir: Path) -> None:
    """Remove what ranks wrote down in an earlier start."""
    for path in (run_dir / "logs").glob("rank-*.failure.json"):
        path.unlink(missing_ok=True)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it was raised from or while handling, the newest first."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)


def is_about_a_peer(error: BaseException) -> bool:
    """Whether the exception is about a connection or a wait, and so most likely follows another rank's end.

    What was raised at first counts: an engine may wrap it, and cleaning up after it may fail in other words.
    """
    *_, first = chain(error)
    if type(first).__name__ == "PortTaken":
        return False
    if isinstance(first, Stop) and not isinstance(first, Stalled):
        return type(first).__name__ in PEER_IS_GONE_TYPES
    if isinstance(first, ConnectionError | TimeoutError | Stalled) or type(first).__name__ in PEER_IS_GONE_TYPES:
        return True
    return isinstance(first, RuntimeError) and any(words in str(first) for words in PEER_IS_GONE)


def innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{Path(__file__).parents[1]}" in frame.filename] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else ""


@dataclass(frozen=True)
class End:
    """How the process of one rank ended."""

    rank: int
    code: int  # negative: by that signal
    time: float  # seconds since 1970 when it was seen
    host: str = ""
    by_us: bool = False  # it was still there when all that was left was ended
    failure: Failure | None = None
    lost: str = ""  # why nothing is known of it: its host is gone

    @property
    def exit_code(self) -> int:
        """What this end makes of the run's exit code if it is the first cause."""
        if self.code < 0:
            return errors.SAVED_AFTER_SIGNAL if -self.code in STOP_SIGNALS else errors.BUG
        return self.code if self.code in (*DELIBERATE, errors.ENDED_AT_ONCE) else errors.BUG

    def __str__(self) -> str:
        if self.lost:
            return f"host {self.host} was lost in the middle of the run ({self.lost})"
        who = f"rank {self.rank} on {self.host or socket.gethostname()}"
        if self.code < 0:
            cause = ": often the kernel, when memory has run out (see dmesg)" if -self.code == signal.SIGKILL else ""
            return f"{who} was ended by {name_of(-self.code)}{cause}"
        if self.failure is None:
            return f"{who} ended with exit code {self.code}"
        first_line = self.failure.message.splitlines()[0] if self.failure.message else ""
        said = f"{self.failure.type}: {first_line}" if first_line else self.failure.type
        return f"{who} failed with {said}" + (f" ({self.failure.where})" if self.failure.where else "")


def first_cause(ends: Iterable[End]) -> End | None:
    """The end that made the others end; None where all ended well or by our hand.

    Signals and exceptions of a rank's own come before what may be either (an abort, an exit without a word), that
    before what only tells of another rank; then the earliest.
    """
    failed = [end for end in ends if end.code and not end.by_us]
    return min(failed, key=lambda end: (likelihood(end), moment(end), end.rank), default=None)


def likelihood(end: End) -> int:
    """0: a cause of its own; 1: may be either; 2: follows another's."""
    if end.lost:
        return 0
    if end.failure is not None:
        return 2 if end.failure.follows else 0
    if end.code < 0:
        return 1 if -end.code == signal.SIGABRT else 0  # NCCL's watchdog aborts a process whose peer is gone
    return 1


def moment(end: End) -> float:
    return end.failure.time if end.failure else end.time
