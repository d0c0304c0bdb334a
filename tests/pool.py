"""A persistent pool of rank processes: they join a gloo process group once and then run one function after another."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 300.0
STUCK_SECONDS = 5.0  # how long the other ranks may take once one has failed
RUN_SECONDS = 240.0


class RankFailed(Exception):
    """A rank raised something that cannot be carried over, died, or did not answer."""


class Pool:
    """`num_ranks` processes in one world.

    `run(function, *args)` calls `function(world, *args)` on every rank and returns what each returned, by rank. What a
    rank raises is raised here, with the traceback of that rank as a note. The function travels by its name, so it has
    to stand at the top of a module.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.folder = ""

    def start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="distft-pool-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.imported"])
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, self.num_ranks, self.folder), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        self.answers(START_SECONDS)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self.processes:
            self.start()
        job = pickle.dumps((list(sys.path), pickle.dumps((function, args))))
        for connection in self.connections:
            connection.send_bytes(job)
        return self.answers(RUN_SECONDS)

    def answers(self, seconds: float) -> list[Any]:
        """One answer of every rank; restarts the pool and raises where one failed and the others may be out of step."""
        deadline = time.monotonic() + seconds
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.num_ranks:
            waiting = {self.connections[rank]: rank for rank in range(self.num_ranks) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    answers[rank] = (False, RankFailed(f"rank {rank} died"))
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + STUCK_SECONDS)
        failures = [value for good, value in answers.values() if not good]
        if failures or len(answers) < self.num_ranks:
            kinds = {type(failure) for failure in failures}
            alike = len(failures) == self.num_ranks and len(kinds) == 1 and RankFailed not in kinds
            if not alike:
                self.stop()
            raise failures[0] if failures else RankFailed(f"only ranks {sorted(answers)} answered in {seconds:.0f} s")
        return [answers[rank][1] for rank in range(self.num_ranks)]

    def stop(self) -> None:
        """End the processes, each by its own id; the next `run` starts new ones."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
            process.join()
        self.processes, self.connections = [], []
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(connection: Connection, rank: int, num_ranks: int, folder: str) -> None:
    """What a rank does: join, then answer each job with (True, value) or (False, exception), until the pipe closes."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(num_ranks),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
    )
    import torch
    import torch.distributed as dist

    from distft.world import join, leave

    torch.set_num_threads(1)
    world = join(dist.FileStore(str(Path(folder) / "store"), num_ranks), timeout=RUN_SECONDS)
    connection.send_bytes(pickle.dumps((True, None)))
    frozen = 0
    while True:
        if len(sys.modules) > frozen:  # what was imported stays: ZeRO-3 collects garbage at every start, half a second
            frozen = len(sys.modules)
            gc.collect()
            gc.freeze()
        try:
            paths, job = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            break
        sys.path.extend(path for path in paths if path not in sys.path)
        try:
            function, args = pickle.loads(job)
            answer = pickle.dumps((True, function(world, *args)))
        except Exception as error:
            answer = carried(error, rank)
        try:
            connection.send_bytes(answer)
        except ConnectionError:
            break
    leave()


def carried(error: Exception, rank: int) -> bytes:
    """The exception with its traceback as a note, or a RankFailed with the same text where it cannot be pickled."""
    text = f"on rank {rank}:\n{traceback.format_exc()}"
    error.__cause__ = error.__context__ = None
    try:
        error.add_note(text)
        answer = pickle.dumps((False, error.with_traceback(None)))
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps((False, RankFailed(text)))
