"""The hosts of a run over ssh: reached, looked at, and found fit before anything is started on them."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.config.schema import Run
from distft.errors import Mistakes, UserMistake
from distft.launch import facts, fitness
from distft.launch.hostfile import Host, choose, parse_hostfile
from distft.launch.hosts import problems_for_pdsh
from distft.launch.session import CONNECT_SECONDS, HostLost, Session, at_once
from distft.launch.topology import checked_host
from distft.launch.watch import say
from distft.prepared import Prepared

HELLO_SECONDS = CONNECT_SECONDS + 20.0  # also of a host whose file system has to fetch Python first


def hosts_of(run: Run) -> list[Host]:
    """The hosts of a run, and the slots that it uses there.

    Raises:
        Mistakes: everything that is wrong with the hostfile, or with what is chosen of it.
    """
    launch = run.launch
    path = Path(launch.hostfile or "").expanduser()
    try:
        listed, problems = parse_hostfile(path.read_text(encoding="utf-8"), f"launch.hostfile={launch.hostfile}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Mistakes([f"launch.hostfile={launch.hostfile} cannot be read: {reason}. Name a file of hosts."]) from None
    if problems:
        raise Mistakes(problems)
    chosen, problems = choose(listed, launch.include, launch.exclude, launch.ranks)
    if absent := [name for name in launch.variables if name not in os.environ]:
        problems.append(f"launch.variables: {', '.join(absent)} is not set here. Set it, or take it out.")
    if launch.address != "auto":
        try:
            checked_host(launch.address)
        except UserMistake as mistake:
            problems.append(f"launch.address: {mistake}")
    if problems:
        raise Mistakes(problems)
    return chosen


@dataclass
class Fleet:
    """The hosts of one run, each with its session, as long as it lasts."""

    run: Run
    run_dir: Path
    hosts: list[Host]
    sessions: dict[str, Session] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # by host, what facts.look_around found
    interfaces: dict[str, str] = field(default_factory=dict)

    # --- before the start -----------------------------------------------------------------------------------------

    def connect(self, names: Sequence[str]) -> list[str]:
        """Open a session to each. Returns a problem for each host that cannot be had."""
        found = {name: Session(name, self.run.launch.ssh_port) for name in names}
        deadline, problems = time.monotonic() + HELLO_SECONDS, []
        for name, session in found.items():
            try:
                session.answer(max(0.1, deadline - time.monotonic()))
                self.sessions[name] = session
            except HostLost as lost:
                if session.speaks_ssh:
                    cure = f"All hosts need the same environment at the same path ({sys.executable})."
                    problems.append(f"{name}: distft does not start there: {lost}. {cure}")
                else:
                    cure = f"`ssh {name} true` has to work without a password."
                    problems.append(f"{name}: it cannot be reached: {lost}. {cure}")
                session.close()
        return problems

    def look_around(self, names: Sequence[str]) -> list[str]:
        """What makes hosts unfit for this run, as far as each can tell alone."""
        token = self.run_dir / f".shared-{secrets.token_hex(8)}"
        token.write_text(token.name)
        sessions, cwd = [self.sessions[name] for name in names], os.getcwd()
        try:
            own = facts.look_around(str(self.run_dir), token.name, cwd)
            answers = at_once(sessions, "look_around", run_dir=str(self.run_dir), token=token.name, cwd=cwd)
        finally:
            token.unlink(missing_ok=True)
        problems = []
        for session in sessions:
            answer = answers[session.host]
            if isinstance(answer, HostLost):
                problems.append(f"{session.host}: {answer}.")
                continue
            before = time.time()
            there = float(session.ask("clock")["time"])
            answer["skew"] = there - (before + time.time()) / 2
            self.told[session.host] = answer
        hosts = [host for host in self.hosts if host.name in names]
        return problems + fitness.judge(hosts, self.told, own, str(self.run_dir), cwd)

    def meet(self, hosts: Sequence[Host]) -> tuple[str, int]:
        """The address and port at which ranks on `hosts` will find each other: held by the first, tried by the others.

        Raises:
            Mistakes: who cannot be reached, by whom.
        """
        first, *others = hosts
        address = self.run.launch.address
        if address == "auto":
            address = self.told[first.name]["address"] or "127.0.0.1"
        if others and (address.startswith("127.") or address == "::1"):
            said = f"{first.name} was reached at {address}, where no other host finds it."
            raise Mistakes([f"{said} Set launch.address to the address that it has for the others."])
        try:
            wanted = 0 if self.run.launch.port == "auto" else self.run.launch.port
            held = self.sessions[first.name].ask("listen", port=wanted)
        except HostLost as lost:
            raise Mistakes([f"{first.name}: {lost}."]) from None
        if "error" in held:
            raise Mistakes([f"{first.name}: launch.port={self.run.launch.port}: {held['error']}. Choose a free one."])
        port, problems = int(held["port"]), []
        sessions = [self.sessions[host.name] for host in hosts]
        for name, answer in at_once(sessions, "reach", address=address, port=port).items():
            if isinstance(answer, HostLost):
                problems.append(f"{name}: {answer}.")
            elif "error" in answer:
                problems.append(
                    f"{name}: it does not reach {first.name} at {address}:{port} ({answer['error']}). Open the port "
                    "(launch.port fixes it), or set launch.address."
                )
            else:
                self.interfaces[name] = self.run.launch.interface or answer["interface"]
        if problems:
            raise Mistakes(problems)
        return address, port

    def refuse(self) -> None:
        """
        Raises:
            Mistakes: everything that makes any host unfit.
        """
        if shutil.which("ssh") is None:
            raise Mistakes(["launch=ssh needs ssh on this machine. Install openssh-client."])
        names = [host.name for host in self.hosts]
        problems = self.connect(names)
        if self.run.launch.engine == "deepspeed":
            problems += problems_for_pdsh(self.run_dir, shutil.which("pdsh"))
        problems += self.look_around([name for name in names if name in self.sessions])
        if not problems:
            self.meet(self.hosts)
        if problems:
            raise Mistakes(problems)

    def refuse_blind(self) -> None:
        """
        Raises:
            Mistakes: hosts that do not see what preflight made.
        """
        prepared = Prepared.read(self.run_dir)
        paths = [prepared.model_folder, prepared.tokenizer_folder, prepared.data_folder]
        problems = []
        for name, answer in at_once(list(self.sessions.values()), "missing", paths=paths).items():
            if isinstance(answer, HostLost):
                problems.append(f"{name}: {answer}.")
            else:
                problems += [
                    f"{name}: there is no {path}, which preflight made here. Set data.cache_dir (for a model of the "
                    "hub HF_HOME) to a folder that all hosts share."
                    for path in answer["missing"]
                ]
        if problems:
            raise Mistakes(problems)

    def available(self) -> Mapping[str, int]:
        """Ranks that can be started now, by host: who was lost is tried once more, and looked at as at first."""
        for name in [name for name, session in self.sessions.items() if session.lost]:
            self.sessions.pop(name).close()
        gone = [host.name for host in self.hosts if host.name not in self.sessions]
        problems = self.connect(gone)
        back = [name for name in gone if name in self.sessions]
        unfit = self.look_around(back) if back else []
        for problem in problems + unfit:
            say(problem)
        if unfit:
            for name in back:
                self.sessions.pop(name).close()
        return {host.name: len(host.slots) for host in self.hosts if host.name in self.sessions}

    def close(self) -> None:
        for session in self.sessions.values():
            session.leave()
        for session in self.sessions.values():
            session.close()
