"""A whole Slurm on this machine: munged, slurmctld and two slurmd, each with a host name of its own.

Nothing of it leaves its folder but the ports, and nothing outlives its context: daemons are ended by their ids, and so
is whatever a job has left. The nodes' names are known to the nodes alone: each slurmd sees an /etc/hosts of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from distft.launch.topology import free_port
from tests.required import cannot

NODES = ("node1", "node2")
CPUS = 4  # of each node, as Slurm is told
GPUS = ("/dev/null", "/dev/zero")  # of each node, in name: Slurm wants devices
READY_SECONDS = 20.0
END_SECONDS = 15.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "unshare", "mount")

CONFIGURATION = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=600
PartitionName=debug Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
PartitionName=long Nodes=node1 MaxTime=UNLIMITED State=UP
"""


class Slurm:
    """A cluster that runs in `folder`. Commands take `environment`, by which Slurm's programs find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *words: str, check: bool = True) -> str:
        """The output of one of Slurm's programs."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def queue(self) -> list[str]:
        """Jobs that have not ended, as `id state`."""
        return self.ask("squeue", "--noheader", "--format=%A %T").splitlines()

    def left(self, seconds: float = 60) -> list[str]:
        """The jobs that are still there after so many seconds, if there are any: a job that has answered needs a while
        to leave."""
        deadline = time.monotonic() + seconds
        while (jobs := self.queue()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return jobs

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := what()):
            assert time.monotonic() < deadline, f"not within {seconds:g} s; the queue: {self.queue()}"
            time.sleep(0.1)
        return value

    def wait_for_end(self, number: str, seconds: float) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.job(number)["JobState"] in ended, seconds)
        return self.job(number)


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """The cluster, ready for jobs. A machine that cannot run it skips the test, or fails it where it is required."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        cannot("cluster", f"needs root and {', '.join(missing) or 'nothing else'}")
    slurm = Slurm(folder)
    write_configuration(folder)
    with ExitStack() as stack:
        stack.callback(end_leftovers, slurm)
        daemon(stack, slurm, "munged", *munge_words(folder))
        slurm.wait_for((folder / "munge.socket").exists, READY_SECONDS)
        daemon(stack, slurm, "slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            own = f"mount --bind {folder}/hosts /etc/hosts && hostname {node}"
            start = f"{own} && exec slurmd -D -N {node} -f {folder}/slurm.conf"
            daemon(stack, slurm, node, "unshare", "--mount", "--uts", "sh", "-c", start)
        stack.callback(end_jobs, slurm)
        idle = ["sinfo", "--noheader", "--partition=debug", "--states=idle", "--format=%D"]
        slurm.wait_for(lambda: slurm.ask(*idle, check=False).strip() == str(len(NODES)), READY_SECONDS)
        yield slurm


def write_configuration(folder: Path) -> None:
    host = socket.gethostname()
    ports: list[int] = []
    for _ in range(1 + len(NODES)):
        ports.append(free_port(ports))
    nodes = [
        f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=gpu:{len(GPUS)} State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    before, separator, partitions = CONFIGURATION.partition("PartitionName")
    text = before + "\n".join(nodes) + "\n" + separator + partitions
    (folder / "slurm.conf").write_text(text.format(host=host, port=ports[0], folder=folder))
    resources = [f"NodeName={','.join(NODES)} Name=gpu File={device}\n" for device in GPUS]
    (folder / "gres.conf").write_text("".join(resources))
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()


def munge_words(folder: Path) -> list[str]:
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    return ["munged", "--foreground", "--force", "--num-threads=2"] + [
        f"--{option}={folder}/munge.{ending}" for option, ending in files.items()
    ]


def daemon(stack: ExitStack, slurm: Slurm, name: str, *words: str) -> None:
    """Start a daemon that ends with the stack. What it says lies in <name>.out."""
    output = stack.enter_context((slurm.folder / f"{name}.out").open("wb"))
    process = subprocess.Popen(
        words, env={**os.environ, **slurm.environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    stack.callback(end, process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_jobs(slurm: Slurm) -> None:
    """Have Slurm end what is still in its queue, while its daemons live."""
    if slurm.queue():
        slurm.ask("scancel", "--user=root", check=False)
        slurm.ask("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        deadline = time.monotonic() + END_SECONDS
        while slurm.queue() and time.monotonic() < deadline:
            time.sleep(0.2)


def end_leftovers(slurm: Slurm) -> None:
    """Whatever a job has left behind: its environment names this cluster."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == slurm.environment["SLURM_CONF"]:
                process.kill()
        except psutil.Error:
            continue
