"""What a run inside a Slurm job asks Slurm: when the job ends, and to put it back into the queue.

https://slurm.schedmd.com/squeue.html, https://slurm.schedmd.com/scontrol.html
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Mapping

from distft.errors import SignalStop

ANSWER_SECONDS = 20.0  # a busy controller of Slurm takes long to answer


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
