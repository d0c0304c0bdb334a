"""Which ranks there are: how many the controller starts, and who a started process is."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.errors import UserMistake

HOST = re.compile(r"[A-Za-z0-9_:][\w.:-]*", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Who a worker process is. `size` ranks in all, `local_size` of them on this machine (0: not told)."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def host(self) -> str:
        return socket.gethostname()


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process, or None where nobody started it as a rank.

    deepspeed, torchrun and the controller set RANK, WORLD_SIZE and LOCAL_RANK. A Slurm step of more than one task
    is a launcher too; its variables are those of https://slurm.schedmd.com/srun.html (output environment variables).
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if all(name in environment for name in names):
        rank, size, local_rank = (whole(name, environment[name]) for name in names)
        return Place(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", 0))))
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if num_tasks > 1 and "SLURM_PROCID" in environment:
        counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = int(environment.get("SLURM_NODEID", 0))
        local_size = counts[node] if node < len(counts) else 0
        return Place(int(environment["SLURM_PROCID"]), num_tasks, int(environment.get("SLURM_LOCALID", 0)), local_size)
    return None


def whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserMistake(f"The environment variable {name}={text} is no number. Unset it.") from None


def slurm_environment(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """What a Slurm task lacks of torch's rendezvous variables: the first node of the step serves."""
    if "RANK" in environment:
        return {}
    first = hosts_of(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "")))[:1]
    # Jobs that share a node must not share a port; a step's own number keeps the steps of one job apart.
    number = int(environment.get("SLURM_JOB_ID", 0)) * 7 + int(environment.get("SLURM_STEP_ID", 0))
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": checked_host(environment.get("MASTER_ADDR") or (first[0] if first else "127.0.0.1")),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(15000 + number % 15000),
    }


def checked_host(name: str) -> str:
    """A host's name or address, of which other programs make arguments.

    Raises:
        UserMistake: it holds more than letters, digits and `. _ : -`, or begins like an option.
    """
    if not HOST.fullmatch(name):
        raise UserMistake(
            f"{name!r} is no host name: letters, digits and . _ : - are wanted, the first no dash. Correct the list of "
            "hosts (MASTER_ADDR, Slurm's SLURM_JOB_NODELIST or the hostfile)."
        )
    return name


def hosts_of(nodelist: str) -> list[str]:
    """Slurm's compact list of hosts, written out: `node[01-03,7],login` -> node01 node02 node03 node7 login."""
    hosts: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodelist):
        hosts += expand(part)
    return hosts


def expand(pattern: str) -> list[str]:
    found = re.search(r"\[([^\]]*)\]", pattern)
    if found is None:
        return [pattern]
    names: list[str] = []
    for item in found.group(1).split(","):
        first, _, last = item.partition("-")
        names += [
            pattern[: found.start()] + str(number).zfill(len(first)) + pattern[found.end() :]
            for number in range(int(first), int(last or first) + 1)
        ]
    return [host for name in names for host in expand(name)]


def tasks_per_node(text: str) -> list[int]:
    """Slurm's tasks per node, written out: `2(x3),1` -> 2 2 2 1."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def count_gpus() -> int:
    """GPUs that this process may use, without importing torch: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = list_gpus()
    if visible is None or not listed:
        return len(listed)
    # CUDA stops at the first entry that it does not know, such as -1.
    count = 0
    for entry in visible.split(","):
        word = entry.strip()
        known = int(word) < len(listed) if word.isdigit() else any(word and word in line for line in listed)
        if not known:
            break
        count += 1
    return count


def list_gpus() -> list[str]:
    """One line a GPU, or a MIG instance where the card is split."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    lines = answer.splitlines()
    instances = [line for line in lines if line.strip().startswith("MIG")]
    return instances or [line for line in lines if line.startswith("GPU ")]


def num_ranks(ranks: int | str) -> int:
    """`launch.ranks` as a number: auto is one rank a GPU, or one where there is none."""
    return max(1, count_gpus()) if ranks == "auto" else int(ranks)


def free_port(taken: Sequence[int] = ()) -> int:
    """A TCP port that nobody listens on now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if port not in taken:
            return int(port)


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of one rank of `size` on this machine."""
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // size))
    if "GLOO_SOCKET_IFNAME" not in os.environ and Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a laptop's host name often resolves to nothing
    return environment
