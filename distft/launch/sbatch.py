"""The script of a Slurm job: a pure function of the run. It lies in the run folder, for sbatch or for a person.

srun starts one task a rank, and each takes its rank and the rendezvous from Slurm's own environment (topology.py). The
options are those of https://slurm.schedmd.com/sbatch.html and srun.html; a container's those of
https://github.com/NVIDIA/pyxis and https://apptainer.org/docs/user/latest/cli/apptainer_exec.html.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from distft.config.schema import Launch, Run
from distft.config.slurm_rules import num_ranks
from distft.launch.slurm import REQUEUE
from distft.launch.start import STATUS_FOLDER, package_path

SCRIPT = "slurm.sbatch"  # in the run folder
# How long srun lets ranks stay once one has left. At a run's end rank 0 is the last, since its tracker may still send
# for a minute; after a crash the others wait for a rank that is gone.
WAIT_SECONDS = 120

TEMPLATE = """\
#!/bin/bash
{directives}

# Submitted again, or put back into the queue, the run goes on from its last checkpoint.
set -e
trap : TERM INT USR1  # the shell outlives what asks its ranks to save
run={run}
{setup}
# Each rank leaves its exit code here (srun tells only the highest, be it that of a rank which it had to end), and rank
# 0 the wish to go back into the queue.
export {status}="$run/logs/exit-$SLURM_JOB_ID" {requeue}="$run/logs/exit-$SLURM_JOB_ID/requeue"
rm -rf "${status}" && mkdir -p "${status}"

code=0
{command} || code=$?
own=$(cd "${status}" && grep -hvx 0 rank-0.exit rank-*.exit 2>/dev/null | head -n 1) || true
[ ! -e "${requeue}" ] || scontrol requeue "$SLURM_JOB_ID"
exit "${{own:-$code}}"
"""


def render(run: Run, run_dir: Path, resume: str | None = None) -> str:
    """The script. `resume`: a checkpoint or run folder that is not written in the run's snapshot."""
    launch = run.launch
    exports = [f"export {name}={shlex.quote(value)}" for name, value in package_path().items()]
    command = [" ".join(["srun", *map(option, step_options(launch).items())]), *container(launch), rank(launch, resume)]
    return TEMPLATE.format(
        directives="\n".join(f"#SBATCH {text}" for text in directives(run, run_dir)),
        run=shlex.quote(str(run_dir)),
        setup="".join(f"{line}\n" for line in [*exports, *launch.setup]),
        status=STATUS_FOLDER,
        command=" \\\n    ".join(command),
        requeue=REQUEUE,
    )


def option(pair: tuple[str, str | int | None]) -> str:
    """An option as a shell takes it, and sbatch's reading of #SBATCH lines, which knows the same quotes."""
    name, value = pair
    return f"--{name}" if value is None else f"--{name}={shlex.quote(str(value))}"


def layout(launch: Launch) -> dict[str, str | int | None]:
    found = {
        "nodes": launch.nodes,
        "ntasks-per-node": num_ranks(launch) // launch.nodes,
        "gpus-per-node": launch.gpus_per_node,
        "cpus-per-task": launch.cpus_per_rank,
    }
    return {name: value for name, value in found.items() if value is not None}


def directives(run: Run, run_dir: Path) -> list[str]:
    """What stands behind `#SBATCH`."""
    launch = run.launch
    found = layout(launch)
    named = {"partition": launch.partition, "account": launch.account, "qos": launch.qos, "time": launch.time}
    found |= {name: str(value) for name, value in named.items() if value is not None}
    # Without `B:` the signal goes to the ranks themselves.
    found |= {"signal": f"USR1@{launch.signal_seconds}", "no-requeue" if launch.requeue is False else "requeue": None}
    # Keys of trackers and hubs come from the environment of whoever submits, never from this file.
    found |= {"export": "ALL", "chdir": str(Path.cwd())}
    found |= {"output": str(run_dir / "logs").replace("%", "%%") + "/slurm-%j.log", "open-mode": "append"}
    found = {"job-name": run.run.name or run_dir.name, **found}
    more = (text.removeprefix("--").partition("=") for text in launch.sbatch)
    return [option(pair) for pair in found.items()] + [
        option((name, value if equals else None)) for name, equals, value in more
    ]


def step_options(launch: Launch) -> dict[str, str | int | None]:
    """Of srun, which takes from its job neither cores (since 22.05) nor, in an allocation made by hand, the rest."""
    return {**layout(launch), "export": "ALL", "kill-on-bad-exit": 0, "wait": WAIT_SECONDS}


def container(launch: Launch) -> list[str]:
    """What puts a rank into its image."""
    if launch.container is None:
        return []
    image = shlex.quote(launch.container)
    if launch.container.endswith(".sif"):
        binds = [f"--bind={shlex.quote(mount)}" for mount in launch.mounts]
        return [" ".join(["apptainer exec --nv", '--bind="$run"', *binds, image])]
    mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in launch.mounts)
    return [f'--container-image={image} --container-mounts="$run:$run"{shlex.quote("," + mounts) if mounts else ""}']


def rank(launch: Launch, resume: str | None) -> str:
    python = "python" if launch.container else shlex.quote(sys.executable)
    again = f" --resume={shlex.quote(resume)}" if resume else ""
    return f'{python} -m distft train --snapshot="$run/config.yaml"{again}'
