"""The rules of a run that goes to Slurm: what a job's script can say, told before Slurm is asked."""

from __future__ import annotations

from collections.abc import Iterator

from distft.config.given import ignored
from distft.config.schema import Launch, Run
from distft.config.times import CLOCK, moment_of

KNOBS = (
    "nodes", "gpus_per_node", "cpus_per_rank", "partition", "account", "qos", "time", "signal_seconds", "sbatch",
    "setup", "container", "mounts",
)  # fmt: skip
EARLIER_SECONDS = 60  # by which Slurm's signal may come before its time (sbatch(1), --signal)
START_SECONDS = 60  # that imports, weights and a first step take at the very least

# Options of sbatch that distft writes itself, with the knob that sets them; "" where none does.
OURS = {
    "nodes": "launch.nodes",
    "ntasks": "launch.ranks",
    "ntasks-per-node": "launch.ranks",
    "gpus-per-node": "launch.gpus_per_node",
    "cpus-per-task": "launch.cpus_per_rank",
    "partition": "launch.partition",
    "account": "launch.account",
    "qos": "launch.qos",
    "time": "launch.time",
    "signal": "launch.signal_seconds",
    "requeue": "launch.requeue",
    "no-requeue": "launch.requeue",
    "job-name": "run.name",
    "output": "",
    "error": "",
    "open-mode": "",
    "export": "",
    "chdir": "",
    "array": "",
    "wrap": "",
    "parsable": "",
    "test-only": "",
}


def num_ranks(launch: Launch) -> int:
    """Ranks of the whole job."""
    return launch.ranks if isinstance(launch.ranks, int) else launch.nodes * (launch.gpus_per_node or 0)


def seconds_of(text: str) -> float:
    """A length [days-]HH:MM:SS in seconds."""
    return moment_of(text, 0.0)


def slurm(run: Run) -> Iterator[str]:
    launch = run.launch
    if launch.target != "slurm":
        yield from ignored(run, [f"launch.{name}" for name in KNOBS], f"with launch={launch.target}")
        return
    yield from layout(launch)
    yield from time(launch)
    yield from options(launch)
    if launch.container is None:
        yield from ignored(run, ["launch.mounts"], "without launch.container")
    if launch.engine != "direct":
        yield f"launch.engine={launch.engine} has no effect with launch=slurm: srun starts the ranks. Drop it."
    if launch.max_restarts:
        yield (
            f"launch.max_restarts={launch.max_restarts} needs a controller beside the ranks, and under srun there is "
            "none. Leave it at 0: a job that Slurm ends or loses goes back into the queue and on from its checkpoint "
            "(launch.requeue); on one node, salloc and launch=local launch.max_restarts=N restart within the job."
        )
    yield from unwritable(run)


def unwritable(run: Run) -> Iterator[str]:
    """What a line of a script cannot carry: sbatch takes backslashes out, even where they are quoted."""
    texts = {f"launch.{name}": getattr(run.launch, name) for name in KNOBS if name != "setup"}
    for name, value in (texts | {"run.name": run.run.name, "run.dir": run.run.dir}).items():
        lines = [str(line) for line in (value if isinstance(value, list) else [value])]
        if any(not line.isprintable() or "\\" in line for line in lines):
            yield f"{name} holds a line break, a backslash or a control character, which sbatch does not read. Drop it."
    if any("\n" in str(line) for line in run.launch.setup):
        yield "launch.setup: each of its lines is one element of the list. Split the one that holds a line break."


def layout(launch: Launch) -> Iterator[str]:
    if isinstance(launch.ranks, int):
        if launch.gpus_per_node is not None and launch.ranks != launch.nodes * launch.gpus_per_node:
            yield (
                f"launch.ranks={launch.ranks} is not launch.nodes={launch.nodes} times launch.gpus_per_node="
                f"{launch.gpus_per_node}: there is one rank a GPU. Drop launch.ranks."
            )
        elif launch.ranks % launch.nodes:
            yield (
                f"launch.ranks={launch.ranks} cannot be laid evenly over launch.nodes={launch.nodes}. Give a multiple."
            )
    elif launch.gpus_per_node is None:
        yield (
            "launch=slurm needs launch.gpus_per_node=N, the GPUs and ranks on each node, or launch.ranks=N for ranks "
            "on CPUs alone."
        )


def time(launch: Launch) -> Iterator[str]:
    if launch.time is None:
        return
    if not CLOCK.fullmatch(str(launch.time)):
        yield (
            f"launch.time={launch.time}: [days-]HH:MM:SS is wanted, such as 04:00:00 (a bare number is minutes to some "
            "and seconds to others)."
        )
    elif seconds_of(str(launch.time)) < launch.signal_seconds + EARLIER_SECONDS + START_SECONDS:
        yield (
            f"launch.time={launch.time} leaves no time for a step: Slurm asks for the end launch.signal_seconds="
            f"{launch.signal_seconds} s before it, up to {EARLIER_SECONDS} s earlier still, and the start alone takes "
            f"{START_SECONDS} s. Give more time, or fewer seconds to save in."
        )


def options(launch: Launch) -> Iterator[str]:
    """What `launch.sbatch` may hold: long options, none of which a knob sets."""
    for option in launch.sbatch:
        name = str(option).removeprefix("--").partition("=")[0]
        if not str(option).startswith("--") or not name or " " in name:
            yield f"launch.sbatch: {option!r} is no long option of sbatch, such as --exclusive or --mem=0. Write it so."
        elif name in OURS:
            cure = f"Use {OURS[name]}." if OURS[name] else "Drop it."
            yield f"launch.sbatch: {option} would be given twice, distft writes --{name} itself. {cure}"
