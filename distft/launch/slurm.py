"""What Slurm is asked: its partitions, whether a job is in the queue, when it ends, and to put it back there.

https://slurm.schedmd.com/sinfo.html, squeue.html, scontrol.html
"""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distft.errors import SignalStop

ANSWER_SECONDS = 20.0  # a busy controller of Slurm takes long to answer
REQUEUE = "DISTFT_REQUEUE"  # environment: a file by which rank 0 asks the job's script, which acts when all have left
LENGTH = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")  # [days-][hours:]minutes:seconds, as sinfo writes them


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    seconds: float | None  # longest time of a job; None: no limit
    nodes: int
    gpus: int  # of the node that has most


def partitions(environment: Mapping[str, str]) -> list[Partition]:
    """Slurm's partitions; none where sinfo does not answer."""
    return read_partitions(ask(["sinfo", "--noheader", "--format=%P|%l|%D|%G"], environment))


def read_partitions(answer: str) -> list[Partition]:
    """`answer`: lines of name, time limit, nodes and generic resources; a line for each kind of node."""
    found: dict[str, Partition] = {}
    for line in answer.splitlines():
        name, limit, nodes, resources = line.split("|")
        name, is_default = name.removesuffix("*"), name.endswith("*")
        seen = found.get(name)
        found[name] = Partition(
            name,
            is_default,
            seconds_of(limit),
            int(nodes) + (seen.nodes if seen else 0),
            max(gpus_of(resources), seen.gpus if seen else 0),
        )
    return list(found.values())


def seconds_of(text: str) -> float | None:
    found = LENGTH.fullmatch(text)
    if found is None:  # infinite, n/a
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def gpus_of(resources: str) -> int:
    """Of a node's generic resources: `gpu:h100:8(S:0-1),nvme:1` -> 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", resources))


JOB_STATES = ("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%F|%K|%T")
UNFINISHED = (
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "PREEMPTED",
)  # fmt: skip


def read_states(answer: str) -> dict[str, str]:
    """The states of JOB_STATES' answer, by `<job>` or `<array>_<index>`; whatever is not over is PENDING or RUNNING."""
    found = {}
    for line in answer.splitlines():
        job, index, state = line.split("|")
        known = state if state in ("PENDING", "RUNNING") or state not in UNFINISHED else "PENDING"
        found[job if index == "N/A" else f"{job}_{index}"] = known
    return found


def state_of(job: str, environment: Mapping[str, str]) -> str:
    """PENDING, RUNNING, …; empty where the queue does not hold the job."""
    return ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], environment).strip()


def end_of_job(environment: Mapping[str, str]) -> float | None:
    """When Slurm will end this job, in seconds since 1970; None outside of a job or without a limit.

    Slurm sets SLURM_JOB_END_TIME since 23.02; before, squeue knows.
    """
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    told = environment.get("SLURM_JOB_END_TIME", "")
    if told.isdigit():
        return float(told)
    answer = ask(["squeue", "--noheader", "--jobs", job, "--format=%e"], environment)
    try:
        return datetime.datetime.fromisoformat(answer.strip().splitlines()[0]).timestamp()
    except (ValueError, IndexError):  # N/A, or no answer
        return None


def ask(command: list[str], environment: Mapping[str, str]) -> str:
    """The answer of one of Slurm's programs; empty where it is missing or fails."""
    program = shutil.which(command[0], path=environment.get("PATH"))
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def requeue(wish: str | bool, stop: SignalStop, environment: Mapping[str, str]) -> str:
    """Put the job back into the queue if `launch.requeue` says so for this stop. Returns what to tell, if anything."""
    job = environment.get("SLURM_JOB_ID")
    if not job or wish is False or (wish == "auto" and not stop.by_slurm):
        return ""
    if note := environment.get(REQUEUE):
        Path(note).touch()
        return f"Job {job} goes back into the queue, to go on from the checkpoint."
    program = shutil.which("scontrol", path=environment.get("PATH"))
    if program is None:
        return f"Job {job} cannot be requeued: there is no scontrol on PATH."
    try:
        done = subprocess.run([program, "requeue", job], capture_output=True, text=True, timeout=ANSWER_SECONDS)
        refusal = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        refusal = str(error)
    if refusal:
        return f"Job {job} was not requeued: {refusal} (sbatch --requeue allows it)."
    return f"Job {job} is back in the queue and will go on from the checkpoint."
