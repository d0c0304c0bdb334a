"""The second thread of a rank: it notes what training need not, publishes the heartbeat, and answers with stacks."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any

from distft import heartbeat
from distft.heartbeat import BESIDE, MAIN, TICK_SECONDS, Beat, Heartbeat

FOLDER = "DISTFT_HEARTBEAT"  # environment: where a controller on this host reads; whoever sets it also watches
PUBLISH_SECONDS = 5.0
STACKS = signal.SIGUSR2  # asks a rank for its stacks; no launcher, no framework and no stop uses it
LOADER = "prefetch"  # name of the thread that makes batches
PACKAGE = str(Path(__file__).parent)


def publication(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / "heartbeat" / f"rank-{rank}.json"


def stacks_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"stacks-rank-{rank}.txt"


def forget(run_dir: Path) -> None:
    """Remove what an earlier start of this run has published; to be called before ranks start."""
    shutil.rmtree(publication(run_dir, 0).parent, ignore_errors=True)


class Pulse:
    """This process's heartbeat while it is a rank of the run in `run_dir`. Use as a context.

    `watch` is called on the second thread twice a second. A rank that gets the signal `STACKS` writes the stacks of
    all its threads into logs/stacks-rank-N.txt, also where its interpreter is held.
    """

    def __init__(self, run_dir: Path, rank: int, size: int, watch: Callable[[Heartbeat], None] | None = None) -> None:
        folder = os.environ.get(FOLDER)
        self.heartbeat = Heartbeat(heartbeat.memory_file(Path(folder), rank) if folder else None, rank, size)
        self.run_dir, self.rank, self.watch = run_dir, rank, watch
        self.alone = size == 1
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.stacks: IO[str] | None = None
        self.published = -PUBLISH_SECONDS

    def __enter__(self) -> Pulse:
        if self.alone:
            forget(self.run_dir)
        publication(self.run_dir, self.rank).parent.mkdir(parents=True, exist_ok=True)
        self.stacks = stacks_file(self.run_dir, self.rank).open("a", encoding="utf-8")
        faulthandler.register(STACKS, file=self.stacks, all_threads=True, chain=False)
        heartbeat.take(self.heartbeat)
        heartbeat.mark("start")
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        heartbeat.mark("end")
        heartbeat.take(None)
        self.left.set()
        self.thread.join(2 * TICK_SECONDS)
        self.publish()
        faulthandler.unregister(STACKS)
        if self.stacks is not None:
            self.stacks.close()
            path = stacks_file(self.run_dir, self.rank)
            if path.exists() and not path.stat().st_size:
                path.unlink()

    def _run(self) -> None:
        while not self.left.wait(TICK_SECONDS):
            self.heartbeat.tick(collectives(), lambda: standing_at(self.heartbeat.phase))
            if time.monotonic() - self.published >= PUBLISH_SECONDS:
                self.publish()
            if self.watch is not None:
                self.watch(self.heartbeat)

    def publish(self) -> None:
        """Write what others are to see, at once or not at all. A run folder that is out of reach ends no run."""
        beat = self.heartbeat.look()
        self.published = time.monotonic()
        path = publication(self.run_dir, self.rank)
        staged = path.with_suffix(".tmp")
        try:
            if beat is not None:
                staged.write_text(published(beat), encoding="utf-8")
                staged.replace(path)
        except OSError:
            return


def collectives() -> list[int]:
    """How many collectives training has started, by process group, in the order in which the groups were made.

    torch counts them for each backend, under gloo and NCCL alike.
    """
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")  # importing torch is for others to do
    groups = list(c10d._world.pg_map) if c10d else []
    return [started(group) for group in groups if group.group_desc != BESIDE]


def started(group: Any) -> int:
    try:
        backends = [group._get_backend(device) for device in group._device_types]
        return sum(int(backend._get_sequence_number_for_group()) for backend in backends)
    except RuntimeError:  # it is being destroyed, or its backend does not count
        return 0


def standing_at(phase: str) -> str:
    """The function and the line at which training stands, and the line of distft that led there.

    In phase `data` training only waits for the thread that makes batches, so that one's place is told.
    """
    wanted = MAIN
    if phase == "data":
        wanted = next((thread.ident for thread in threading.enumerate() if thread.name == LOADER), MAIN)
    inner: FrameType | None = sys._current_frames().get(wanted or 0)
    if inner is None:
        return ""
    ours: FrameType | None = inner
    while ours is not None and not ours.f_code.co_filename.startswith(PACKAGE):
        ours = ours.f_back
    if ours is None or ours is inner:
        return line_of(inner)
    return f"{line_of(inner)}, called at {line_of(ours)}"


def line_of(frame: FrameType) -> str:
    return f"{frame.f_code.co_name}, {'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"


def published(beat: Beat) -> str:
    """A beat as JSON. `time` is this host's wall clock, `seconds` how long the rank had not moved by then."""
    return json.dumps(
        {
            "rank": beat.rank,
            "ranks": beat.size,
            "host": beat.host,
            "process": beat.pid,
            "machine": beat.machine,
            "step": beat.step,
            "phase": beat.phase,
            "steps": beat.steps,
            "marks": beat.number,
            "collectives": list(beat.collectives),
            "seconds": round(beat.age, 2),
            "where": beat.where,
            "time": time.time(),
        }
    )


def read_publication(text: str, silent: float) -> Beat | None:
    """A beat out of a publication that has not changed for `silent` seconds of the reader's own clock.

    No clock of the other host is used: what was published keeps its age while new ones come, and grows older when
    they stop coming. None where the text is no publication.
    """
    try:
        found = json.loads(text)
        answers = silent < 2 * PUBLISH_SECONDS
        return Beat(
            found["rank"], found["ranks"], found["process"], found["host"], found["machine"], found["marks"],
            found["step"], found["phase"], found["steps"], tuple(found["collectives"]),
            age=found["seconds"] + (0 if answers else silent), answers=answers, where=found["where"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None
