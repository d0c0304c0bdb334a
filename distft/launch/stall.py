"""A run that stands still: seen from its ranks' heartbeats, told in one sentence, its stacks saved, ended.

A controller on the host looks twice a second (`StallWatch`). Where none watches, under `deepspeed train.py` or
torchrun, each rank's second thread does it as far as it can (`OwnWatch`): it looks once its own rank stands still, and
the lowest rank that still answers speaks.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psutil

from distft import errors
from distft.config.schema import Run
from distft.heartbeat import Beat, Heartbeat, memory_file, read_file, this_machine
from distft.launch.blame import STOPPED, Patience, sentence
from distft.launch.restart import newest_checkpoint
from distft.launch.start import package_path
from distft.launch.topology import place_of
from distft.launch.worker import leave_exit_code
from distft.log import last_word
from distft.pulse import FOLDER, PUBLISH_SECONDS, STACKS, forget, publication, read_publication, stacks_file
from distft.result import write_failure

STACK_SECONDS = 3.0  # how long ranks get to write their stacks
LEAVE_SECONDS = 2.0  # after which the neighbours of the rank that spoke are killed; launchers look once a second
SHARED = Path("/dev/shm")  # where the heartbeats of a host's ranks lie, each start's in a folder of its own
PREFIX = "distft-beats-"
YOUNG_SECONDS = 60.0
TURN_SECONDS = 3.0  # between one rank's chance to speak and the next one's, where no controller does


class Sights:
    """What can be seen from here of every rank: the memory of those on this host, the publications of the others."""

    def __init__(self, run_dir: Path, size: int, memory: Path | None) -> None:
        self.run_dir, self.size, self.memory = run_dir, size, memory
        self.machine = this_machine()
        self.publications: dict[int, tuple[str, float]] = {}  # by rank: the text, and when it was first seen

    def of_this_host(self) -> list[Beat]:
        if self.memory is None:
            return []
        found = [read_file(memory_file(self.memory, rank)) for rank in range(self.size)]
        return [with_state(beat) for beat in found if beat is not None]

    def of_others(self, known: Sequence[Beat]) -> list[Beat]:
        seen = {beat.rank for beat in known}
        found = [self.published(rank) for rank in range(self.size) if rank not in seen]
        return [beat for beat in found if beat is not None]

    def published(self, rank: int) -> Beat | None:
        try:
            text = publication(self.run_dir, rank).read_text(encoding="utf-8")
        except OSError:
            return None
        now = time.monotonic()
        if self.publications.get(rank, ("", 0.0))[0] != text:
            self.publications[rank] = text, now
        silent = now - self.publications[rank][1]
        beat = read_publication(text, silent)
        if beat is None or beat.machine != self.machine:
            return beat
        beat = with_state(beat)
        stopped = beat.state in STOPPED and beat.answers  # it will publish no more: its age grows from now on
        return dataclasses.replace(beat, age=beat.age + silent, answers=False) if stopped else beat


def with_state(beat: Beat) -> Beat:
    try:
        return dataclasses.replace(beat, state=psutil.Process(beat.pid).status())
    except psutil.Error:
        return dataclasses.replace(beat, state="gone")


def judged(beats: Sequence[Beat], size: int, patience: Patience) -> str | None:
    seen = {beat.rank for beat in beats}
    return sentence(beats, patience, time.time(), [rank for rank in range(size) if rank not in seen])


# --- the controller's -----------------------------------------------------------------------------------------------


@contextmanager
def watching(run: Run, run_dir: Path, size: int) -> Iterator[tuple[Callable[[], str | None], dict[str, str]]]:
    """For one start of `size` ranks: the look of a controller, and what the ranks' environment needs for it."""
    shared = SHARED if os.access(SHARED, os.W_OK) else None
    if shared is not None:
        sweep_out(shared)
    patience = Patience(run.guard.stall_seconds, run.launch.start_timeout)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=shared) as memory, held(Path(memory)):
        watch = StallWatch(run_dir, size, patience, Path(memory))
        yield watch.look, {FOLDER: memory}
    if watch.said is not None:
        last_word.of_stall(run_dir, watch.said, package_path())


@contextmanager
def held(folder: Path, alone: bool = False) -> Iterator[None]:
    """A lock on the folder, which ends with this process however that ends. `alone`: only where nobody holds it.

    Raises:
        OSError: somebody does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def sweep_out(shared: Path) -> None:
    """Delete the heartbeats that killed controllers have left over, and nothing that is not one. A process id would not
    tell who is gone: containers share this memory, but not their processes."""
    for folder in shared.glob(f"{PREFIX}*"):
        with suppress(OSError):  # in use, somebody else's, or gone by now
            if time.time() - folder.stat().st_mtime < YOUNG_SECONDS:
                continue  # perhaps not locked yet
            with held(folder, alone=True):
                for path in folder.glob("rank-*.beat"):
                    path.unlink()
                folder.rmdir()  # not where anything else lies in it


def watching_hosts(run: Run, run_dir: Path, size: int) -> Callable[[], str | None]:
    """The look of a controller at ranks on other hosts, for one start of them."""
    return StallWatch(run_dir, size, Patience(run.guard.stall_seconds, run.launch.start_timeout), None).look


class StallWatch:
    """The controller's look at `size` ranks whose memory lies in `memory`; None: they run on other hosts, and are seen
    through what they publish."""

    def __init__(self, run_dir: Path, size: int, patience: Patience, memory: Path | None) -> None:
        self.run_dir, self.size, self.patience = run_dir, size, patience
        self.sights = Sights(run_dir, size, memory)
        self.next_look = 0.0
        self.said: str | None = None
        forget(run_dir)

    def look(self) -> str | None:
        """The sentence about a run that stands still, once; stacks of all ranks are saved by then. Else None."""
        beats = self.sights.of_this_host()
        if self.sights.memory is None:
            if time.monotonic() < self.next_look:
                return None
            self.next_look = time.monotonic() + PUBLISH_SECONDS / 2
            beats = self.sights.of_others([])
        waited = max((beat.age / self.patience.of(beat) for beat in beats if not beat.ended), default=0.0)
        if waited < 0.5:
            return None
        beats += self.sights.of_others(beats)
        said = judged(beats, self.size, self.patience)
        if said is None:
            return None
        self.said = said
        save_stacks(self.run_dir, beats)
        publish(self.run_dir, said)
        return told(self.run_dir, said)


def told(run_dir: Path, said: str) -> str:
    return f"{said}\nStacks of all ranks lie in {run_dir / 'logs'}/stacks-rank-*.txt. Go on with resume={run_dir}."


# --- what was said, in the run folder -------------------------------------------------------------------------------


def verdict_file(run_dir: Path) -> Path:
    return run_dir / "logs" / "heartbeat" / "stalled.json"


def publish(run_dir: Path, said: str) -> None:
    """Let the other ranks know that the run has ended."""
    path = verdict_file(run_dir)
    try:
        staged = path.with_suffix(".tmp")
        verdict = {"sentence": said, "machine": this_machine(), "time": time.time()}
        staged.write_text(json.dumps(verdict), encoding="utf-8")
        staged.replace(path)
    except OSError:
        return


def machine_that_told(run_dir: Path) -> str | None:
    """The machine on which it was said that the run stands still; None: nobody has."""
    try:
        return str(json.loads(verdict_file(run_dir).read_text(encoding="utf-8"))["machine"])
    except OSError:
        return None


def save_stacks(run_dir: Path, beats: Sequence[Beat]) -> None:
    """Have every rank of this host write the stacks of its threads, and wait until they have."""
    machine, before = this_machine(), {}
    for beat in beats:
        if beat.machine != machine or beat.ended or beat.state == "gone":
            continue
        path = stacks_file(run_dir, beat.rank)
        if beat.state in STOPPED:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"Rank {beat.rank} (process {beat.pid}) is stopped and cannot show its stacks.\n")
            continue
        before[path] = path.stat().st_size if path.exists() else 0
        try:
            os.kill(beat.pid, STACKS)
        except ProcessLookupError:
            del before[path]
    deadline, sizes, settled = time.monotonic() + STACK_SECONDS, dict(before), 0
    while time.monotonic() < deadline and settled < 3:
        time.sleep(0.1)
        now = {path: path.stat().st_size if path.exists() else 0 for path in before}
        settled = settled + 1 if now == sizes and all(now[path] > before[path] for path in before) else 0
        sizes = now


def end_later(pids: Sequence[int]) -> None:
    """Kill what is still there once this process has left: the launcher takes the first exit code that it sees."""
    numbers = " ".join(map(str, pids))
    if numbers:
        subprocess.Popen(
            ["sh", "-c", f"sleep {LEAVE_SECONDS:g}; kill -KILL {numbers} 2>/dev/null"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


# --- the ranks' own -------------------------------------------------------------------------------------------------


class OwnWatch:
    """What a rank's second thread does about a stall: `__call__` twice a second.

    It ends this process where a controller or another rank has said that the run stands still. Where no controller
    watches it looks itself, in turn after the lower ranks that still answer.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        size: int,
        patience: Patience,
    ) -> None:
        self.run_dir, self.rank, self.size, self.patience = run_dir, rank, size, patience
        self.sights = None if os.environ.get(FOLDER) else Sights(run_dir, size, None)
        self.found_at: float | None = None  # when this rank first saw the stall
        self.speaks = False

    def __call__(self, heartbeat: Heartbeat) -> None:
        own = heartbeat.look()
        if own is None or own.age < self.patience.of(own) / 2:
            self.found_at = None
        elif (machine := machine_that_told(self.run_dir)) is not None:
            if machine != own.machine:
                save_stacks(self.run_dir, [own])
            self.go()
        elif self.sights is not None:
            self.judge(self.sights)

    def judge(self, sights: Sights) -> None:
        beats = sights.of_others([])
        said = judged(beats, self.size, self.patience)
        if said is None:
            self.found_at = None
            return
        now = time.monotonic()
        if self.found_at is None:
            self.found_at = now
        before = sum(beat.rank < self.rank and beat.answers and not beat.ended for beat in beats)
        if now - self.found_at >= TURN_SECONDS * before:
            self.speak(said, beats)

    def speak(self, said: str, beats: Sequence[Beat]) -> None:
        """Say it for all ranks, and end those of this host: who hangs would not end by itself."""
        self.speaks = True
        sys.stdout.flush()
        sys.stderr.write(f"distft: {told(self.run_dir, said)}\n")
        write_failure(self.run_dir, errors.Stalled.status, said, newest_checkpoint(self.run_dir))
        save_stacks(self.run_dir, beats)
        publish(self.run_dir, said)
        machine = this_machine()
        last_word.of_stall(self.run_dir, said, package_path(), wait=False)  # this rank's exit code has to be the first
        end_later([beat.pid for beat in beats if beat.machine == machine and beat.rank != self.rank and not beat.ended])
        self.go()

    def go(self) -> NoReturn:
        if (place := place_of(os.environ)) is not None:
            leave_exit_code(place, errors.STALLED)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(errors.STALLED)

    def knows(self) -> bool:
        """Whether the run was said to stand still: what else a rank meets then follows from that."""
        return machine_that_told(self.run_dir) is not None

    def follow(self) -> NoReturn:
        """End this process with the others, after its second thread where that speaks for all."""
        while self.speaks:
            time.sleep(1)
        self.go()
