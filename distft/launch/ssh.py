"""`launch=ssh`: the ranks of all hosts started, watched and ended as one run.

Each host has a starter (node.py) for the whole of the run. It starts the host's ranks itself (direct), or a torchrun
that does, or attends those that DeepSpeed's launcher starts over pdsh.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from distft import errors
from distft.config.schema import Run
from distft.errors import Mistakes
from distft.launch import failure
from distft.launch.failure import End
from distft.launch.fleet import Fleet, hosts_of
from distft.launch.hostfile import Host, ranks_of
from distft.launch.hosts import commands, deepspeed_command, variables_of, write_hostfile
from distft.launch.session import Attended, HostLost, Remote
from distft.launch.start import Process, start
from distft.launch.stop import Signals
from distft.launch.watch import Ending, Look, Waited, Watched, ending, say, watch


@contextmanager
def fleet_of(run: Run, run_dir: Path) -> Iterator[Fleet]:
    """The hosts of a run, found fit; nothing is left on them afterwards.

    Raises:
        Mistakes: everything that is wrong with any of them.
    """
    fleet = Fleet(run, run_dir, hosts_of(run))
    try:
        fleet.refuse()
        yield fleet
    finally:
        fleet.close()


@dataclass
class Attempt:
    """One start of the ranks on `hosts`."""

    fleet: Fleet
    hosts: list[Host]
    signals: Signals
    look: Look
    words: Sequence[str] = ()  # for the ranks behind `distft`, where they are not to train

    @property
    def run_dir(self) -> Path:
        return self.fleet.run_dir

    def carry_out(self, resume: str | None, told: Mapping[str, str]) -> Ending:
        """Start the ranks and wait for their end. `told`: variables for them, besides what every host is given."""
        try:
            address, port = self.fleet.meet(self.hosts)
            failure.forget(self.run_dir)
            if self.fleet.run.launch.engine == "deepspeed":
                return self.over_pdsh(address, port, resume, told)
            return self.over_ssh(address, port, resume, told)
        except (Mistakes, HostLost) as problem:
            say(str(problem))
            return Ending(errors.BUG, None, str(problem))

    def variables(self, host: Host, told: Mapping[str, str]) -> dict[str, str]:
        fleet = self.fleet
        return {**variables_of(host, fleet.told[host.name], fleet.interfaces[host.name], fleet.run), **told}

    def over_ssh(self, address: str, port: int, resume: str | None, told: Mapping[str, str]) -> Ending:
        engine, token = self.fleet.run.launch.engine, secrets.token_hex(8)
        ranks, processes, owners = ranks_of(self.hosts), list[Waited](), list[str]()
        for name, its in commands(engine, self.hosts, address, port, self.run_dir, resume, self.words).items():
            host = next(host for host in self.hosts if host.name == name)
            self.ask(
                host, "start", token=token, run_dir=str(self.run_dir), cwd=os.getcwd(),
                variables=self.variables(host, told),
                ranks=list(ranks[name]) if engine == "torchrun" else [],
                commands=[
                    [number, command.argv, command.environment, number == 0 or engine == "torchrun"]
                    for number, command in its
                ],
            )  # fmt: skip
            processes += [Remote(self.fleet.sessions[name], number) for number, _ in its]
            owners += [name] * len(its)
        watched = self.watch(processes, lambda: None)
        if engine == "torchrun":
            return self.end_of_launcher(watched)
        ends = [
            self.end(rank, owner, code, watched, rank)
            for rank, (owner, code) in enumerate(zip(owners, watched.codes, strict=True))
        ]
        return ending(ends, self.signals, watched.stalled, self.run_dir)

    def over_pdsh(self, address: str, port: int, resume: str | None, told: Mapping[str, str]) -> Ending:
        token, ranks = secrets.token_hex(8), ranks_of(self.hosts)
        for host in self.hosts:
            variables = self.variables(host, told)
            self.ask(host, "attend", token=token, variables=variables, ranks=list(ranks[host.name]))
        write_hostfile(self.run_dir, self.hosts)
        command = deepspeed_command(self.hosts, address, port, self.fleet.run, self.run_dir, resume, token)
        [launcher] = start([command], self.run_dir / "logs", quiet=False, environment={})
        attended = [Attended(self.fleet.sessions[host.name], ranks[host.name]) for host in self.hosts]
        return self.end_of_launcher(self.watch([launcher, *attended], lambda: end_family(launcher)))

    def ask(self, host: Host, do: str, **values: Any) -> None:
        session = self.fleet.sessions[host.name]
        session.begin()
        answer = session.ask(do, **values)
        if "error" in answer:
            raise Mistakes([f"{host.name}: the ranks cannot be started: {answer['error']}."])

    def watch(self, processes: Sequence[Waited], kill: Callable[[], None]) -> Watched:
        sessions = [self.fleet.sessions[host.name] for host in self.hosts]

        def send(number: int) -> None:
            for session in sessions:
                session.tell("signal", number=number)

        def kill_all() -> None:
            for session in sessions:
                session.kill()
            kill()

        return watch(processes, self.signals, send, kill_all, self.look)

    def end(self, rank: int, host: str, code: int, watched: Watched, process: int) -> End:
        lost = self.fleet.sessions[host].lost
        by_us = process in watched.ended and not lost
        said = failure.read(self.run_dir, rank)
        return End(rank, code, watched.seen[process], host, by_us, said, lost if said is None else "")

    def end_of_launcher(self, watched: Watched) -> Ending:
        """Behind torchrun and deepspeed: their exit codes say nothing, those that the ranks left do."""
        if not any(watched.codes):
            return Ending(errors.DONE)
        ends = []
        for host, ranks in ranks_of(self.hosts).items():
            session = self.fleet.sessions[host]
            known = ranks if session.lost else [rank for rank in ranks if rank in session.ended]
            ends += [
                End(
                    rank, session.ended.get(rank, -6), watched.seen[0], host,
                    failure=failure.read(self.run_dir, rank),
                    lost=session.lost if rank not in session.ended else "",
                )
                for rank in known
            ]  # fmt: skip
        return ending(ends, self.signals, watched.stalled, self.run_dir, launcher_failed=True)


def end_family(process: Process) -> None:
    """End a launcher of this machine and all that it has started, by their process ids."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
