"""`distft doctor`: would a run start here, and would anything slow it down? A verdict a line, with the cure."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.check import check as problems_of
from distft.config.ranges import POSITIVE
from distft.config.schema.doctor import CHECKS, DoctoredRun
from distft.config.words import unlisted
from distft.errors import DONE, NEGATIVE_VERDICT, Mistakes, UserMistake
from distft.launch.hosts import PORT
from distft.launch.start import Command, package_path
from distft.launch.stop import Signals
from distft.launch.topology import Place, environment_of, free_port, num_ranks
from distft.launch.watch import run_direct

if TYPE_CHECKING:
    from distft.config.load import Composed
    from distft.doctor.verdict import Verdict


def main(composed: Composed, argv: Sequence[str], place: Place | None) -> int:
    """Start ranks that look, here or on the hosts of a hostfile, or be one. Returns 0, or 3 if a run would fail.

    `argv`: the command line behind the verb. `place`: which rank a launcher made this process; None: nobody did.

    Raises:
        Mistakes: what is asked for cannot be done.
    """
    run: DoctoredRun = composed.run
    problems = check(run, place) + problems_of(run)
    if composed.line.sweep:
        problems.append("distft doctor takes one configuration: no -m.")
    if problems:
        raise Mistakes(problems)
    if place is not None:
        return look(run, place)
    return over_ssh(run, argv) if run.launch.target == "ssh" else control(run, argv)


def check(run: DoctoredRun, place: Place | None) -> list[str]:
    """Every problem of the section `doctor`, and of how it is started."""
    doctor = run.doctor
    problems = list(unlisted("doctor.checks", doctor.checks, CHECKS, "is nothing that is looked at"))
    if not doctor.checks:
        problems.append(f"doctor.checks=[] looks at nothing. There are: {', '.join(CHECKS)}.")
    for name in ("seconds", "link_seconds", "min_bandwidth"):
        value, (allowed, wanted) = getattr(doctor, name), POSITIVE
        if value is not None and not allowed(value):
            problems.append(f"doctor.{name}={value}: {wanted} is wanted.")
    if doctor.slow_link <= 1:
        problems.append(f"doctor.slow_link={doctor.slow_link}: a number above 1 is wanted.")
    if doctor.output is not None and not Path(doctor.output).absolute().parent.is_dir():
        problems.append(f"doctor.output={doctor.output}: its folder does not exist. Make it, or name another.")
    if place is None and (run.launch.target == "slurm" or run.launch.engine != "direct"):
        how = f"launch={run.launch.target} launch.engine={run.launch.engine}"
        problems.append(
            f"{how}: distft doctor starts its ranks itself, here or over ssh. Drop these, or start it as a run is "
            "started by hand: torchrun, deepspeed --module or srun, with `-m distft doctor`."
        )
    if run.launch.dry_run and place is not None:
        problems.append("launch.dry_run=true prints what a controller would start; under a launcher nothing is left.")
    return problems


def control(run: DoctoredRun, argv: Sequence[str]) -> int:
    """The ranks in processes of their own, so that what ends one of them is a verdict and not the end."""
    size, port = num_ranks(run.launch.ranks), free_port()
    words = [sys.executable, "-m", "distft", "doctor", *argv]
    commands = [Command(words, {**package_path(), **environment_of(rank, size, port)}) for rank in range(size)]
    if run.launch.dry_run:
        print("\n".join(["# What would be started:", *map(str, commands)]))
        return DONE
    signals = Signals()
    with tempfile.TemporaryDirectory(prefix="distft-doctor-") as folder, signals.caught():
        Path(folder, "logs").mkdir()
        return run_direct(commands, Path(folder), signals).code


def over_ssh(run: DoctoredRun, argv: Sequence[str]) -> int:
    """A rank for each slot of `launch.hostfile`. What `launch=ssh` would refuse are verdicts here, one a host."""
    from distft.doctor.disk import existing
    from distft.doctor.verdict import FAILS, Verdict, verdict_line
    from distft.launch.fleet import hosts_of
    from distft.launch.hosts import commands
    from distft.launch.ssh import Attempt, fleet_of

    hosts, words, signals = hosts_of(run), ["doctor", *argv], Signals()
    folder = existing(Path(run.run.dir or "runs"))
    if run.launch.dry_run:
        planned = commands("direct", hosts, hosts[0].name, PORT, folder, None, words)
        print("\n".join(f"# on {host}:\n{command}" for host, its in planned.items() for _, command in its))
        return DONE
    with tempfile.TemporaryDirectory(prefix=".distft-doctor-", dir=folder) as room, signals.caught():
        Path(room, "logs").mkdir()
        try:
            with fleet_of(run, Path(room)) as fleet:
                return Attempt(fleet, hosts, signals, lambda: None, words).carry_out(None, {}).code
        except Mistakes as mistakes:
            verdicts = [Verdict("hosts", FAILS, problem) for problem in mistakes.problems]
            print("\n".join([*(f"  {verdict}" for verdict in verdicts), verdict_line(verdicts)]), flush=True)
            if run.doctor.output:
                write(Path(run.doctor.output), verdicts, NEGATIVE_VERDICT)
            return NEGATIVE_VERDICT


def look(run: DoctoredRun, place: Place) -> int:
    """One rank. Rank 0 prints what all of them found."""
    from distft.doctor.examine import Examination
    from distft.doctor.verdict import verdict_line, would_fail
    from distft.launch.worker import be_a_rank

    be_a_rank(place)
    if place.is_main:
        print(f"distft doctor looks at {', '.join(run.doctor.checks)}", flush=True)
    examination = Examination(run, place, run.doctor.checks)
    verdicts, who = examination.all()
    code = examination.agreed(NEGATIVE_VERDICT if would_fail(verdicts) else DONE)
    if place.is_main:
        print(f"{who}:\n" + "\n".join(f"  {verdict}" for verdict in verdicts))
        print(verdict_line(verdicts), flush=True)
        if run.doctor.output:
            write(Path(run.doctor.output), verdicts, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check that hangs, or a link that is dead, would keep this process


def write(path: Path, verdicts: Sequence[Verdict], code: int) -> None:
    """
    Raises:
        UserMistake: doctor.output cannot be written.
    """
    from distft.doctor.verdict import as_dict

    try:
        path.write_text(
            json.dumps({"exit_code": code, "verdicts": [as_dict(one) for one in verdicts]}, indent=2) + "\n"
        )
    except OSError as error:
        raise UserMistake(f"doctor.output={path} cannot be written: {error.strerror}.") from None
