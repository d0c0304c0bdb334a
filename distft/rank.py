"""One rank, from its start to its exit code: what it says and writes down, however it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distft import errors
from distft.config.redact import redact
from distft.errors import SignalStop, Stalled, Stop

if TYPE_CHECKING:
    from distft.config.schema import Run
    from distft.launch.topology import Place


def be_rank(argv: list[str], place: Place, command: list[str]) -> int:
    """A worker: agree with the other ranks, then train."""
    from distft.launch import agree, worker
    from distft.verbs.preflight import preflight
    from distft.verbs.train import work

    argv = worker.take_environment(argv)
    worker.be_a_rank(place)
    code, run_dir = errors.BUG, worker.folder_told(argv)
    try:
        run, run_dir, store = worker.prepare(argv, command, place, preflight)
        code = work(run, run_dir, store)
    except SignalStop as stop:
        code = stop.exit_code
        if place.is_main:
            told(stop)
            requeue(run, stop)
    except Stop as stop:
        code = stop.exit_code
        leave_word(stop, place, run_dir)
        if isinstance(stop, agree.PortTaken) and run_dir is not None:
            return code  # the controller takes another port
        # Rank 0 speaks for all; but that it cannot be reached only the other nodes can tell.
        if place.is_main or (isinstance(stop, Stalled) and place.local_rank == 0):
            told(stop)
        if isinstance(stop, Stalled):  # dropping the frames would wait for the collective that never ends
            worker.leave_exit_code(place, code)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except Exception as error:
        leave_word(error, place, run_dir)
        raise
    finally:
        worker.leave_exit_code(place, code)
    return code


def leave_word(error: Exception, place: Place, run_dir: Path | None) -> None:
    """What this rank dies of, in the run folder if it is known already."""
    from distft.launch.failure import Failure

    if run_dir is not None:
        Failure.of(error, place.rank).write(run_dir)
        if place.is_main:
            tell_failure(run_dir, error)


def in_process(run: Run, run_dir: Path, prepared: bool = False) -> int:
    from distft.verbs.preflight import preflight
    from distft.verbs.train import work

    if not prepared:
        preflight(run, run_dir)
    try:
        return work(run, run_dir, None)
    except SignalStop as stop:
        told(stop)
        requeue(run, stop)
        return stop.exit_code
    except Exception as error:
        tell_failure(run_dir, error)
        raise


def requeue(run: Run, stop: SignalStop) -> None:
    from distft.launch import slurm

    if said := slurm.requeue(run.launch.requeue, stop, os.environ):
        sys.stderr.write(f"distft: {said}\n")


def tell_failure(run_dir: Path, error: Exception) -> None:
    """`result.json` of a run that ends by what no rank can go on from; other ends are written where they are raised."""
    from distft.launch.restart import newest_checkpoint
    from distft.result import write_failure

    if not isinstance(error, Stop) or isinstance(error, Stalled):
        status = error.status if isinstance(error, Stop) else "failed"
        write_failure(run_dir, status, redact(f"{type(error).__name__}: {error}"), newest_checkpoint(run_dir))


def told(stop: Stop) -> int:
    if str(stop):
        sys.stdout.flush()
        sys.stderr.write(f"distft: {redact(str(stop))}\n")
    return stop.exit_code
