"""One rank: from its command line to the moment when training starts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from distft.config.check import check, settle, with_absolute_paths
from distft.config.launch_rules import launched_by_hand
from distft.config.load import compose, read_snapshot, whole_hash
from distft.config.schema import Run
from distft.errors import USER_MISTAKE, Mistakes, Stop, UserMistake
from distft.launch import agree, deadline, folder, lock, output
from distft.launch.facts import memory_folder
from distft.launch.node import VARIABLES
from distft.launch.restart import newest_checkpoint, wrote_checkpoints
from distft.launch.start import STATUS_FOLDER, STEP
from distft.launch.topology import Place, place_of, slurm_environment
from distft.parent import follow_controller
from distft.result import write_failure

if TYPE_CHECKING:
    from torch.distributed import Store

Preflight = Callable[[Run, Path], None]
LOCAL_RANK = re.compile(r"--local[_-]rank(=\d+)?")


@dataclass(frozen=True)
class Arguments:
    """A worker's command line. The controller gives a snapshot, a person gives overrides."""

    overrides: list[str]
    snapshot: Path | None
    prepared: bool  # preflight is done
    resume: str | None


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The command line without the `--local_rank=N` that deepspeed's launcher puts in."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif LOCAL_RANK.fullmatch(word):
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Split the controller's own flags from the rest.

    Raises:
        UserMistake: overrides beside a snapshot, which would not be read.
    """
    values: dict[str, str] = {}
    rest = []
    for word in without_local_rank(argv):
        found = re.fullmatch(r"--(snapshot|prepared|resume)(?:=(.*))?", word)
        if found:
            values[found.group(1)] = found.group(2) or ""
        else:
            rest.append(word)
    snapshot = Path(values["snapshot"]) if "snapshot" in values else None
    if snapshot is not None and rest:
        raise UserMistake(
            f"--snapshot={snapshot} is the whole configuration, so {rest[0]} would not be read. To change a run: "
            f"--config-dir {snapshot.parent} --config-name {snapshot.stem} {rest[0]}."
        )
    return Arguments(rest, snapshot, "prepared" in values, values.get("resume"))


def read_run(arguments: Arguments) -> Run:
    """The checked run of a worker's command line."""
    if arguments.snapshot is not None:
        run = read_snapshot(arguments.snapshot)
    else:
        run = compose(arguments.overrides).run
    problems = check(run)
    if arguments.snapshot is None:
        problems += launched_by_hand(run)
    if problems:
        raise Mistakes(problems)
    if arguments.snapshot is None:
        deadline.settle(run, time.time(), {})  # refuses one that is over
    resume = arguments.resume
    if arguments.snapshot is not None and not arguments.prepared:  # a script starts ranks, perhaps not the first time
        run_dir = arguments.snapshot.absolute().parent
        if (resume or run.resume != "auto") and wrote_checkpoints(run_dir):
            resume = str(run_dir)
    if resume:
        run = dataclasses.replace(run, resume=resume)
    return with_absolute_paths(run)


def be_a_rank(place: Place) -> None:
    """Set what the environment lacks, and leave the process id where a controller looks for it.

    Until training begins there is nothing to save, so a stop signal ends the process as it ends any other. Once it has
    begun, a controller that is killed takes its ranks along by way of a checkpoint.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else a traceback
    for name, value in slurm_environment(place, os.environ).items():
        os.environ[name] = value
    status = os.environ.get(STATUS_FOLDER)
    if status:
        Path(status, f"rank-{place.rank}.pid").write_text(str(os.getpid()))
        if place.is_main and (step := os.environ.get("SLURM_STEP_ID")):
            Path(status, STEP).write_text(f"{os.environ['SLURM_JOB_ID']}.{step}")
    follow_controller()


def take_environment(argv: Sequence[str]) -> list[str]:
    """Set the variables that node.py laid down on this host, out of everybody's sight. Returns the other words."""
    flag = "--environment="
    for name in [word.removeprefix(flag) for word in argv if word.startswith(flag)]:
        os.environ.update(json.loads((memory_folder() / f"distft-{name}" / VARIABLES).read_text()))
    return [word for word in argv if not word.startswith(flag)]


def folder_told(argv: Sequence[str]) -> Path | None:
    """The run folder that a controller names on its ranks' command line; None where there is no controller."""
    told = [word.removeprefix("--snapshot=") for word in argv if word.startswith("--snapshot=")]
    return Path(told[0]).absolute().parent if told and "--prepared" in argv else None


def leave_exit_code(place: Place, code: int) -> None:
    """For a controller behind deepspeed or torchrun, which change exit codes."""
    status = os.environ.get(STATUS_FOLDER)
    if status:
        Path(status, f"rank-{place.rank}.exit").write_text(str(code))


def end_by_mistake(run_dir: Path, sentence: str) -> NoReturn:
    """End this rank at once, whatever it is doing: a user's mistake that only shows while a step does not end."""
    sys.stdout.flush()
    sys.stderr.write(f"distft: {sentence}\n")
    sys.stderr.flush()
    write_failure(run_dir, UserMistake.status, sentence, newest_checkpoint(run_dir))
    if (place := place_of(os.environ)) is not None:
        leave_exit_code(place, USER_MISTAKE)
    os._exit(USER_MISTAKE)


def prepare(argv: Sequence[str], command: Sequence[str], place: Place, preflight: Preflight) -> tuple[Run, Path, Store]:
    """Read the run, agree with the other ranks, do preflight once. Returns the run, its folder and the store.

    Raises:
        Stop: on the rank that tells why; on the others its quiet form, `agree.Elsewhere`.
    """
    try:
        arguments = read_arguments(argv)
        run = read_run(arguments)
        if arguments.snapshot is None:
            known, run = folder.place_run(run)
        else:
            known = arguments.snapshot.absolute().parent
    except Stop as stop:
        if not place.is_main:
            agree.report(place, str(stop))
            raise agree.Elsewhere(stop.exit_code) from None
        raise

    # A slow import must not count against the others' waiting, so the store comes first.
    store = agree.connect(place, run.launch.start_timeout)
    agreement = agree.Agreement(place, store, run.launch.start_timeout)
    agreement.same_config(whole_hash(run))

    def make() -> Path:
        if arguments.snapshot is not None:
            assert known is not None
            lock.take(known)
            if not arguments.prepared:  # no controller has done it
                folder.forget(known)
            return known
        return folder.make_folder(run, command, known, os.environ.get("SLURM_JOB_ID"))

    run_dir = agreement.folder(make)
    if not place.is_main:
        lock.join(run_dir)
    output.keep(run_dir, place.rank)
    if not arguments.prepared:
        agreement.preflight(lambda: preflight(settle(run), run_dir))
    sys.stdout.flush()
    return settle(run), run_dir, store
