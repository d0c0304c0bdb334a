"""`launch=slurm`: a run is handed to Slurm, as a job for its queue, or to the nodes of the allocation that it is in."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from distft import errors
from distft.config.schema import Launch, Run
from distft.config.slurm_rules import num_ranks
from distft.config.slurm_rules import seconds_of as seconds_of_limit
from distft.config.words import nearest
from distft.errors import Mistakes, UserMistake
from distft.launch import lock, slurm
from distft.launch.sbatch import SCRIPT, render
from distft.launch.start import STEP, Command, start
from distft.launch.stop import Signals
from distft.launch.watch import kill_groups, watch

JOB = "slurm.json"  # in the run folder: the job that it was given to last
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on step ids name batch, interactive and other shells (slurm.h)

# Slurm's words for what it refuses, and what to do about it.
CURES = {
    "account": "Set launch.account to one that you may use; `sacctmgr show associations user=$USER` lists them.",
    "partition": "Set launch.partition; sinfo lists them.",
    "qos": "Set launch.qos, or drop it.",
    "time limit": "Lower launch.time.",
    "feature": "Correct --constraint in launch.sbatch; `sinfo --format='%N %f'` lists the features of nodes.",
    "node configuration": "No node has that: lower launch.nodes, launch.gpus_per_node, launch.cpus_per_rank or what "
    "launch.sbatch asks for; `sinfo --format='%P %D %c %m %G'` lists what there is.",
    "node count": "Lower launch.nodes.",
    "configuration source": "This machine knows no cluster: start on a login node.",
    "contact": "Slurm's controller does not answer: try `sinfo`, or wait.",
    "memory": "Correct --mem in launch.sbatch.",
}


def refuse(run: Run, folder: Path | None, environment: Mapping[str, str] = os.environ) -> None:
    """Whatever is wrong with the cluster's part of a run, before anything is written.

    Raises:
        Mistakes: all of it.
    """
    if run.launch.target == "local":
        problems = list(half(run.launch, environment))
    elif in_job(environment):
        problems = list(allocated(run.launch, environment))
    else:
        problems = list(queued(run, folder, environment))
    if problems:
        raise Mistakes(problems)


def in_job(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("SLURM_JOB_ID"))


def nodes_here(environment: Mapping[str, str]) -> int:
    """Nodes that Slurm gives this process: those of its step, or of its allocation where it is the job's own shell."""
    step = environment.get("SLURM_STEP_ID", "")
    own = step.isdigit() and int(step) < FIRST_SPECIAL_STEP
    return int(environment.get("SLURM_STEP_NUM_NODES" if own else "SLURM_JOB_NUM_NODES", 1))


def half(launch: Launch, environment: Mapping[str, str]) -> Iterator[str]:
    """A run that would leave nodes of its allocation idle, where nobody said so."""
    nodes = nodes_here(environment)
    if nodes > 1 and launch.ranks == "auto":
        yield (
            f"This Slurm allocation has {nodes} nodes, and launch=local would use this one alone. For all of them: "
            f"launch=slurm launch.nodes={nodes} launch.gpus_per_node=N. For this one alone: launch.ranks=N."
        )


def allocated(launch: Launch, environment: Mapping[str, str]) -> Iterator[str]:
    nodes = nodes_here(environment)
    if nodes != launch.nodes:
        yield f"launch.nodes={launch.nodes}, but this allocation has {nodes}: the ranks run on all of them. Set it so."
    if shutil.which("srun", path=environment.get("PATH")) is None:
        yield "launch=slurm: there is no srun on PATH, which starts the ranks on the nodes of this allocation."


def queued(run: Run, folder: Path | None, environment: Mapping[str, str]) -> Iterator[str]:
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        yield (
            "launch=slurm: there is no sbatch on PATH. Start this on a login node of the cluster (module load slurm?), "
            "or see what it would submit with launch.dry_run=true."
        )
        return
    job = job_of(folder) if folder else None
    if job and (state := slurm.state_of(job, environment)):
        yield (
            f"run.dir={folder}: job {job} of this run is in the queue already ({state}). Wait for its end, end it with "
            f"`scancel {job}`, or name another run.dir."
        )
    yield from beyond(run.launch, slurm.partitions(environment))


def beyond(launch: Launch, partitions: list[slurm.Partition]) -> Iterator[str]:
    """What no partition that is asked for has. Nothing where Slurm has told of none."""
    if not partitions:
        return
    known = {partition.name: partition for partition in partitions}
    wanted = launch.partition.split(",") if launch.partition else [one.name for one in partitions if one.is_default]
    for name in (name for name in wanted if name not in known):
        near = nearest(name, known)
        yield (
            f"launch.partition={name}: there is no such partition. "
            + (f"Did you mean {near}? " if near else "")
            + f"There are: {', '.join(known)}."
        )
    chosen = [known[name] for name in wanted if name in known]
    if not chosen:
        return
    names = " and ".join(partition.name for partition in chosen)
    nodes, gpus = max(one.nodes for one in chosen), max(one.gpus for one in chosen)
    if launch.nodes > nodes:
        yield f"launch.nodes={launch.nodes}: partition {names} has {nodes}. Lower it, or set another launch.partition."
    if (launch.gpus_per_node or 0) > gpus:
        yield (
            f"launch.gpus_per_node={launch.gpus_per_node}: no node of partition {names} has more than {gpus}. Lower "
            "it, or set another launch.partition."
        )
    limits = [partition.seconds for partition in chosen if partition.seconds is not None]
    if launch.time is not None and launch.qos is None and len(limits) == len(chosen):
        longest = max(limits)
        if seconds_of_limit(str(launch.time)) > longest:
            yield (
                f"launch.time={launch.time}: partition {names} ends jobs after {clock(longest)}, so this one would "
                "wait for ever. Lower it: a run that is ended goes back into the queue and on from its checkpoint."
            )


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours:02}:{rest // 60:02}:{rest % 60:02}"


def write_script(run: Run, run_dir: Path, resume: str | None) -> Path:
    path = run_dir / SCRIPT
    path.write_text(render(run, run_dir, resume), encoding="utf-8")
    path.chmod(0o755)
    return path


def shown(run: Run, run_dir: Path, resume: str | None) -> str:
    """What `launch.dry_run` prints: the script, which may be copied as it is, and what would be done with it."""
    path = write_script(run, run_dir, resume)
    program = "bash" if in_job(os.environ) else "sbatch"
    return f"{path.read_text(encoding='utf-8')}\n# What would be run: {program} {shlex.quote(str(path))}"


def try_out(script: Path) -> str:
    """Have Slurm look the job over without taking it. Returns when it would start, in Slurm's words.

    Raises:
        UserMistake: Slurm would refuse it.
    """
    done = sbatch(["--test-only"], script)
    said = done.stderr.strip().removeprefix("sbatch: ")
    if done.returncode:
        raise UserMistake(refusal(said))
    return said


def refusal(said: str) -> str:
    lines = [re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", line) for line in said.splitlines()]
    text = "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))
    cure = next(
        (cure for word, cure in CURES.items() if word in text.lower()), "Correct launch.sbatch or the other knobs."
    )
    return f"Slurm refuses the job: {text}. {cure}"


def sbatch(words: list[str], script: Path) -> subprocess.CompletedProcess[str]:
    """Run sbatch on the script. The environment of whoever submits goes with the job, but for what belongs to this
    process alone and for variables of sbatch that would overrule the script."""
    names = re.findall(r"^#SBATCH --([\w-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    overruling = {f"SBATCH_{name.upper().replace('-', '_')}" for name in (*names, "timelimit")}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DISTFT_LOCK") and name not in overruling
    }
    try:
        return subprocess.run(
            ["sbatch", *words, str(script)], env=kept, capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserMistake("Slurm did not answer sbatch within 120 s. Look at sinfo, then try again.") from None


def submit(run: Run, run_dir: Path, script: Path, expected: str) -> int:
    """Put the job into the queue. Returns exit code 0 once it is there.

    Raises:
        UserMistake: Slurm refuses it.
    """
    lock.release()  # the job's ranks hold the folder from their start on
    done = sbatch(["--parsable"], script)
    if done.returncode:
        raise UserMistake(refusal(done.stderr))
    job = done.stdout.strip().partition(";")[0]
    (run_dir / JOB).write_text(json.dumps({"job": job}) + "\n", encoding="utf-8")
    size, nodes = num_ranks(run.launch), run.launch.nodes
    print(
        f"distft: job {job} is in the queue: {size} rank{'s' if size > 1 else ''} on {nodes} node"
        f"{'s' if nodes > 1 else ''}. {re.sub(r'^Job [0-9]+ to start', 'Slurm expects it to start', expected)}\n"
        f"  folder  {run_dir}\n"
        f"  state   squeue --jobs={job}\n"
        f"  output  tail -F {shlex.quote(str(run_dir / 'logs' / 'rank-0.log'))}   (all ranks: slurm-{job}.log)\n"
        f"  end     scancel --signal=TERM {job}   (saves first; scancel {job} alone leaves Slurm's KillWait for it)",
        flush=True,
    )
    return errors.DONE


def run_here(run_dir: Path, script: Path, signals: Signals) -> int:
    """Have the job's script start the ranks on the nodes of this allocation, and wait. Returns the run's exit code.

    Signals go to the step by way of scancel: srun would forward some, and end the step for others.
    """
    processes = start([Command(["bash", str(script)])], run_dir / "logs", quiet=False, environment={})
    step = run_dir / "logs" / f"exit-{os.environ['SLURM_JOB_ID']}" / STEP

    def send(number: int) -> None:
        if step.exists():
            slurm.ask(["scancel", f"--signal={number}", step.read_text()], os.environ)
        else:
            os.killpg(processes[0].pid, signal.SIGTERM)

    def kill() -> None:
        send(signal.SIGKILL)
        kill_groups(processes)

    code = watch(processes, signals, send, kill).codes[0]
    if signals.at_once:
        return errors.ENDED_AT_ONCE
    return code if code >= 0 else errors.BUG


def job_of(folder: Path) -> str | None:
    """The job that a run folder was last given to."""
    try:
        return str(json.loads((folder / JOB).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError):
        return None
