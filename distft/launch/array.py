"""`hydra/launcher=submitit_slurm` (or `submitit_local`): the jobs of a sweep run elsewhere, on Slurm as one job array.

The launcher is Hydra's plugin over submitit (https://hydra.cc/docs/plugins/submitit_launcher). Each of its tasks is one
controller with the devices of its job, which notes its end in the sweep's folder as any job does. What is added here:
refusals before anything is submitted, states from squeue (submitit asks sacct, which many clusters lack), and jobs that
end without a word, by a lost node or by scancel, which are waited for and told.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import errors
from distft.config.schema import Launch
from distft.errors import UserMistake
from distft.launch import queue, slurm
from distft.launch.jobs import JOBS, note_job
from distft.launch.start import package_path

if TYPE_CHECKING:
    from distft.config.load import Composed

SUBMITIT = ("submitit_slurm", "submitit_local")
COMMAND = "DISTFT_COMMAND"  # environment: the sweep's command line, for the command.txt of its jobs
POLL_SECONDS = 30.0  # between two looks at the queue, at most
DEFAULT_MINUTES = 60  # the launcher's own timeout_min
# As the launcher calls what is checked for a single job.
NAMES = {
    "launch.partition": "hydra.launcher.partition",
    "launch.gpus_per_node": "hydra.launcher.gpus_per_node",
    "launch.time": "hydra.launcher.timeout_min, as HH:MM:SS",
    "launch=slurm": "hydra/launcher=submitit_slurm",
}


def launcher_of(composed: Composed) -> str:
    chosen = [override.value() for override in composed.line.parsed if override.key_or_group == "hydra/launcher"]
    return str(chosen[-1]) if chosen and composed.line.sweep else "basic"


def problems(composed: Composed) -> list[str]:
    """What is wrong with the cluster's part of a sweep, before anything is submitted."""
    return list(found(composed))


def found(composed: Composed) -> Iterator[str]:
    if composed.line.sweep and composed.run.launch.target == "slurm":
        yield (
            "launch=slurm puts one run into the queue, and a sweep has several. Drop it, and have the sweep's jobs run "
            "as an array: hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=N."
        )
        return
    if launcher_of(composed) not in SUBMITIT:
        return
    given = {o.key_or_group.partition("hydra.launcher.")[2]: o.value() for o in composed.line.parsed}
    for name in ("nodes", "tasks_per_node"):
        if given.get(name, 1) != 1:
            yield f"hydra.launcher.{name}={given[name]}: a job is one process, which starts its ranks. Drop it."
    if launcher_of(composed) != "submitit_slurm":
        return
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        yield "hydra/launcher=submitit_slurm: there is no sbatch on PATH. Start this on a login node of the cluster."
        return
    minutes = given.get("timeout_min", DEFAULT_MINUTES)
    asked = Launch(
        partition=given.get("partition"),
        gpus_per_node=given.get("gpus_per_node"),
        qos=given.get("qos"),
        time=queue.clock(60 * minutes) if isinstance(minutes, int) else None,
    )
    for problem in queue.beyond(asked, slurm.partitions(os.environ)):
        yield re.sub("|".join(NAMES), lambda name: NAMES[name.group()], problem)


@contextmanager
def handed_over(composed: Composed, command: Sequence[str]) -> Iterator[None]:
    """While Hydra has the sweep: what its jobs elsewhere need, and patience for those that end without a result."""
    launcher = launcher_of(composed)
    if launcher not in SUBMITIT or composed.sweep_dir is None:
        yield
        return
    from submitit.core.utils import FailedJobError, UncompletedJobError

    # USR1 is what asks distft's ranks to save; submitit's own USR2 would end the job's controller over them.
    told = {"SUBMITIT_PREEMPT_SIGNAL": "USR1", "HYDRA_FULL_ERROR": "1", COMMAND: shlex.join(command), **package_path()}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    folder = Path(composed.sweep_dir)
    try:
        if launcher == "submitit_slurm":
            ask_squeue()
        yield
    except (FailedJobError, UncompletedJobError) as error:
        if not submitted(folder):
            raise UserMistake(queue.refusal(str(error))) from None
        wait_for_rest(folder)  # the verdict tells of this one
    except KeyboardInterrupt:
        if waiting := unfinished(folder):
            ids = " ".join(sorted(waiting))
            sys.stderr.write(f"distft: the jobs stay in the queue; end them with `scancel {ids}`.\n")
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def ask_squeue() -> None:
    """Have submitit look into the queue for the states of its jobs."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class QueueWatcher(SlurmInfoWatcher):
        def _make_command(self) -> list[str] | None:
            return [*slurm.JOB_STATES] if self._registered - self._finished else None

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            text = string.decode() if isinstance(string, bytes) else string
            states = slurm.read_states(text)
            # Slurm forgets a job some minutes after its end.
            return {job: {"State": states.get(job, "COMPLETED")} for job in self._registered}

    SlurmJob.watcher = QueueWatcher(delay_s=int(POLL_SECONDS))


def submitted(sweep_dir: Path) -> list[str]:
    """Ids of a sweep's jobs, `<array>_<index>`, in the order of their numbers."""
    ids = [path.name.removesuffix("_submitted.pkl") for path in (sweep_dir / ".submitit").glob("*/*_submitted.pkl")]
    return sorted(
        (name for name in ids if re.fullmatch(r"\d+(_\d+)?", name)), key=lambda name: [*map(int, name.split("_"))]
    )


def unfinished(sweep_dir: Path) -> set[str]:
    """Arrays of the sweep that the queue holds."""
    states = slurm.read_states(slurm.ask([*slurm.JOB_STATES], os.environ))
    return {job.partition("_")[0] for job in submitted(sweep_dir) if states.get(job, "COMPLETED") in slurm.UNFINISHED}


def wait_for_rest(sweep_dir: Path) -> None:
    if unfinished(sweep_dir):
        print("distft: the other jobs of the sweep go on; waiting for them", flush=True)
    pause = 1.0
    while unfinished(sweep_dir):
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)


def words_of(number: int, composed: Composed) -> list[str]:
    """The overrides of a job by its number, as far as they can be told: of Hydra's own sweeper alone."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if any(override.key_or_group == "hydra/sweeper" for override in composed.line.parsed):
        return []
    given: list[Any] = [override for override in composed.line.parsed if not override.is_hydra_override()]
    jobs = [job for batch in BasicSweeper.split_arguments(given, max_batch_size=None) for job in batch]
    return list(jobs[number]) if number < len(jobs) else []


def note_lost(composed: Composed) -> None:
    """Note each job that has ended without a word as failed."""
    if launcher_of(composed) not in SUBMITIT or composed.sweep_dir is None:
        return
    folder = Path(composed.sweep_dir)
    path = folder / JOBS
    noted = {json.loads(line)["job"] for line in path.read_text(encoding="utf-8").splitlines()} if path.exists() else ()
    for number, job in enumerate(submitted(folder)):
        if number not in noted:
            logs = folder / ".submitit" / job
            sys.stderr.write(f"distft: job {number} ({job}) ended without a word: look at {logs}/{job}_0_log.err\n")
            note_job(folder, number, words_of(number, composed), folder / str(number), errors.BUG)
