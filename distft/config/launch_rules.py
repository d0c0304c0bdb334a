"""The rules of how a run is started, ended and started again."""

from __future__ import annotations

import re
from collections.abc import Iterator

from distft.config.given import ignored
from distft.config.schema import Run
from distft.config.times import moment_of

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
SSH = ("hostfile", "include", "exclude", "ssh_port", "address", "port", "interface", "variables")


def launching(run: Run) -> Iterator[str]:
    launch = run.launch
    if launch.target != "ssh":
        names = [f"launch.{name}" for name in SSH]
        yield from ignored(run, names, f"with launch={launch.target} (launch=ssh starts on several hosts)")
    elif not launch.hostfile:
        yield "launch=ssh needs launch.hostfile: a file of hosts, a line such as `node01 slots=8` for each."
    if launch.port != "auto" and not (type(launch.port) is int and 0 < launch.port < 65536):
        yield f"launch.port={launch.port}: auto or a port from 1 to 65535 is wanted."
    if wrong := [name for name in launch.variables if not NAME.fullmatch(str(name))]:
        yield f"launch.variables: {', '.join(map(str, wrong))}: names are wanted, such as [MY_TOKEN]; values stay here."
    if launch.max_restarts == 0:
        why = "with launch.max_restarts=0: a crash ends the run"
        yield from ignored(run, ["launch.min_ranks", "launch.restart_seconds"], why)
    elif launch.engine != "direct":
        yield (
            f"launch.max_restarts={launch.max_restarts} needs launch.engine=direct: behind {launch.engine} distft "
            "cannot see which rank failed first. Drop launch.engine, or leave launch.max_restarts at 0."
        )
    if isinstance(launch.ranks, int) and isinstance(launch.min_ranks, int) and launch.min_ranks > launch.ranks:
        yield (
            f"launch.min_ranks={launch.min_ranks} is more than launch.ranks={launch.ranks}, which the run starts with. "
            "Lower launch.min_ranks."
        )
    if launch.deadline not in ("auto", "none"):
        try:
            fits = moment_of(launch.deadline, 0.0) > 0
        except ValueError:
            fits = False
        if not fits:
            yield (
                f"launch.deadline={launch.deadline}: seconds, [days-]HH:MM:SS, a time such as 2030-01-31T18:00, auto "
                "(Slurm's end of the job) or none is wanted."
            )


def launched_by_hand(run: Run) -> Iterator[str]:
    """What has no effect where ranks were started by another than distft."""
    if (target := run.launch.target) != "local":
        yield (
            f"launch={target} has no effect under a launcher of ranks, which starts them itself. Start with python "
            f"train.py … launch={target}, or drop launch={target} and what belongs to it."
        )
    if run.launch.max_restarts:
        yield (
            f"launch.max_restarts={run.launch.max_restarts} has no effect under a launcher of ranks, which ends when "
            "one of them does. Start with python train.py … launch.ranks=N, or leave it at 0."
        )
