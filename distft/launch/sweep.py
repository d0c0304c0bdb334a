"""`deepspeed train.py -m …`: a sweep of ranks that a foreign launcher started.

Each rank walks through the same list of jobs and runs each in a fresh child on a port of its own. The ranks keep in
step through the launcher's store: the sweep's folder, the port of each job and whether a rank of it has failed.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from distft import errors
from distft.config.load import Composed, compose, hydra_over
from distft.errors import Stop, UserMistake
from distft.launch import agree
from distft.launch.failure import DELIBERATE
from distft.launch.jobs import compose_sweep, in_sweep, job_words, note_job, sweep_verdict
from distft.launch.start import verb_command
from distft.launch.stop import Signals
from distft.launch.topology import Place, free_port
from distft.launch.watch import CRASH_SECONDS, STOP_SECONDS, kill_groups
from distft.launch.worker import without_local_rank

if TYPE_CHECKING:
    from torch.distributed import Store


def jobs_of(composed: Composed) -> list[list[str]]:
    """The overrides of each job, in the order of Hydra's basic sweeper, which is the same on every rank.

    Raises:
        UserMistake: a sweeper that chooses by results, or a launcher of jobs, under a launcher of ranks.
    """
    line = composed.line
    for override, text in zip(line.parsed, line.overrides, strict=True):
        other_sweeper = override.is_hydra_override() and override.key_or_group not in ("hydra.sweep.dir", "hydra.mode")
        if other_sweeper or override.key_or_group.partition(".")[0] == "sweep":
            raise UserMistake(
                f"{text} works only where distft starts the ranks itself: python train.py -m … with launch.ranks=N."
            )
    with hydra_over(line.config_dir) as hydra:  # which knows the choices that a glob means
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(line.overrides)
    given = [override for override in parsed if not override.is_hydra_override()]
    batches = BasicSweeper.split_arguments(given, max_batch_size=None)
    return [list(job) for job in itertools.chain.from_iterable(batches)]


def run_sweep(argv: Sequence[str], place: Place) -> int:
    """All jobs, one after another. A failed job does not end the sweep; returns the sweep's exit code."""
    composed, jobs = read_jobs(argv, place)
    seconds = composed.run.launch.start_timeout
    store = agree.connect(place, seconds)
    agreement = agree.Agreement(place, store, seconds)
    agreement.same_config(repr(jobs))
    assert composed.sweep_dir is not None
    folder = agreement.folder(lambda: made(Path(composed.sweep_dir or "multirun").absolute()))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    signals = Signals()
    flags = [f"--config-name={composed.primary}"]
    flags += [f"--config-dir={composed.line.config_dir}"] if composed.line.config_dir else []
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    with signals.caught():
        for number, overrides in enumerate(jobs):
            if place.is_main:
                chosen = shlex.join(word for word in overrides if word not in shared)
                print(f"distft: job {number} of {len(jobs)}: {chosen}", flush=True)
            code = run_job(number, [*flags, *overrides], folder, place, store, signals)
            if place.is_main:
                note_job(folder, number, overrides, folder / str(number), code)
            meet(store, f"done/{number}", place)
            if signals.received:
                return errors.SAVED_AFTER_SIGNAL
    return sweep_verdict(folder) if place.is_main else errors.DONE


def read_jobs(argv: Sequence[str], place: Place) -> tuple[Composed, list[list[str]]]:
    try:
        composed = compose_sweep(without_local_rank(argv))
        return composed, jobs_of(composed)
    except Stop as stop:
        if not place.is_main:
            agree.report(place, str(stop))
            raise agree.Elsewhere(stop.exit_code) from None
        raise


def made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserMistake(f"hydra.sweep.dir={folder} cannot be made: {error.strerror}.") from None
    return folder


def run_job(number: int, words: list[str], folder: Path, place: Place, store: Store, signals: Signals) -> int:
    """This rank's child of one job. Returns the job's exit code on rank 0, the child's own elsewhere."""
    port_key, failed_key = f"port/{number}", f"failed/{number}"
    if place.is_main:
        store.set(port_key, str(free_port([int(os.environ["MASTER_PORT"])])))
    port = store.get(port_key).decode()
    group = compose([*words]).run
    run = in_sweep(group, folder / str(number))
    command = verb_command("train", *words, *job_words(run))
    child = subprocess.Popen(
        command.argv, env={**os.environ, **command.environment, "MASTER_PORT": port}, process_group=0
    )
    sent, deadline = 0, float("inf")
    while child.poll() is None:
        if len(signals.received) > sent:
            child.send_signal(signals.received[sent])
            sent += 1
        if deadline == float("inf") and store.check([failed_key]):
            code = json.loads(store.get(failed_key))
            deadline = time.monotonic() + (STOP_SECONDS if code in DELIBERATE else CRASH_SECONDS)
        if signals.at_once or time.monotonic() > deadline:
            kill_groups([child])
        time.sleep(0.1)
    code = child.returncode
    if code:
        store.set(failed_key, json.dumps(code))
    if place.is_main and code not in DELIBERATE and store.check([failed_key]):
        return errors.BUG
    return code


def meet(store: Store, key: str, place: Place) -> None:
    """Wait until every rank has ended this job: the next one wants all of them."""
    store.set(f"{key}/{place.rank}", "")
    patience = datetime.timedelta(seconds=STOP_SECONDS + 60)
    store.wait([f"{key}/{rank}" for rank in range(place.size)], patience)
    if place.is_main:  # it serves the store, so it leaves last: the others may still be reading
        store.wait([f"{key}/{rank}/left" for rank in range(1, place.size)], patience)
    else:
        store.set(f"{key}/{place.rank}/left", "")
