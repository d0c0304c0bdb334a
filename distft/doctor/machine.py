"""The hardware of one host and the programs on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from distft.doctor.verdict import FAILS, WARN, Verdict, worst
from distft.launch.topology import list_gpus

GIB = 2**30
MEMORY_OF_A_RANK = GIB  # what torch, transformers and a tiny model take
SHARED_MEMORY = 64 << 20  # Docker's default; NCCL's ranks on one host talk through it
CONTROL_GROUPS = [  # of the second version and of the first: where a container sees its own limit
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
]
HEARTBEATS = 1 << 20  # bytes of shared memory for what a controller reads of its ranks


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use: bytes of memory, and whether a product on it is right."""

    name: str
    free: int
    total: int
    works: str = ""  # why not; empty where it does


@dataclass(frozen=True)
class Hardware:
    """What is there. Memory in bytes."""

    cores: int  # that this process may use
    memory: int  # available, also to this container
    shared_memory: int | None  # free in /dev/shm; None: there is none
    gpus: tuple[Gpu, ...]  # that torch can use
    listed: int  # GPUs that nvidia-smi lists
    driver: str = ""
    torch: str = ""
    cuda: str = ""  # that torch was built for; empty: for none


def look(local_size: int) -> list[Verdict]:
    return judge(survey(), local_size)


def survey() -> Hardware:
    import torch

    shared = Path("/dev/shm")
    gpus = [try_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return Hardware(
        cores=len(os.sched_getaffinity(0)),
        memory=available_memory(),
        shared_memory=shutil.disk_usage(shared).free if shared.is_dir() else None,
        gpus=tuple(gpus),
        listed=len(list_gpus()),
        driver=driver_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
    )


def try_gpu(index: int) -> Gpu:
    """Multiply on it: a GPU that has fallen off its bus is listed and does nothing."""
    import torch

    device = torch.device("cuda", index)
    name = torch.cuda.get_device_name(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
        ones = torch.ones(256, 256, device=device)
        works = "" if bool((ones @ ones == 256).all()) else "a product of ones is wrong"
        del ones
    except RuntimeError as error:
        return Gpu(name, 0, 0, str(error).splitlines()[0])
    return Gpu(name, free, total, works)


def available_memory() -> int:
    """Bytes that can still be had: of the machine, or of this control group where that has less."""
    available = int(psutil.virtual_memory().available)
    for folder, limit, used in CONTROL_GROUPS:
        try:
            most, taken = Path(folder, limit).read_text().strip(), int(Path(folder, used).read_text())
        except (OSError, ValueError):
            continue
        available = available if most == "max" else min(available, int(most) - taken)
    return available


def driver_version() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.split("\n")[0].strip()


def judge(found: Hardware, local_size: int) -> list[Verdict]:
    """Whether `local_size` ranks can work on this hardware."""
    verdicts = [*judge_gpus(found, local_size), *judge_memory(found, local_size)]
    if found.gpus:
        names = ", ".join(sorted({gpu.name for gpu in found.gpus}))
        good = f"{len(found.gpus)} x {names}, driver {found.driver or 'unknown'}, CUDA {found.cuda}"
    else:
        good = "no GPU: ranks work on the CPU"
    memory = f"{found.cores} cores, {found.memory / GIB:.0f} GiB of memory free"
    return worst("devices", verdicts, f"{good}; {memory}")


def judge_gpus(found: Hardware, local_size: int) -> list[Verdict]:
    verdicts = []
    if found.listed and not found.gpus:
        build = f"torch {found.torch} is built for {'CUDA ' + found.cuda if found.cuda else 'no GPU'}"
        said = (
            f"nvidia-smi lists {found.listed} GPUs (driver {found.driver or 'unknown'}), but torch sees none: {build}"
        )
        cure = "Install the build of torch for this driver, or look at CUDA_VISIBLE_DEVICES."
        verdicts.append(Verdict("devices", FAILS, said, cure))
    if found.gpus and local_size > len(found.gpus):
        said = f"{local_size} ranks for {len(found.gpus)} GPUs"
        verdicts.append(Verdict("devices", FAILS, said, f"Set launch.ranks={len(found.gpus)}, or auto."))
    for index, gpu in enumerate(found.gpus):
        if gpu.works:
            said = f"GPU {index} ({gpu.name}) does not compute: {gpu.works}"
            verdicts.append(Verdict("devices", FAILS, said, "Leave it out with CUDA_VISIBLE_DEVICES; look at dmesg."))
        elif gpu.free < 0.9 * gpu.total:
            used = f"{(gpu.total - gpu.free) / GIB:.0f} of {gpu.total / GIB:.0f} GiB"
            said = f"GPU {index} ({gpu.name}): {used} are taken by others"
            verdicts.append(Verdict("devices", WARN, said, "nvidia-smi tells by whom."))
    return verdicts


def judge_memory(found: Hardware, local_size: int) -> list[Verdict]:
    verdicts = []
    if found.memory < MEMORY_OF_A_RANK * local_size:
        said = f"{found.memory / GIB:.1f} GiB of memory are free for {local_size} ranks"
        verdicts.append(Verdict("devices", FAILS, said, "End what takes it, ask for more, or start fewer ranks."))
    if found.cores < local_size:
        said = f"{found.cores} cores for {local_size} ranks"
        verdicts.append(Verdict("devices", WARN, said, "Ask for a core a rank at least (Slurm: --cpus-per-task)."))
    cure = "docker run --shm-size=16g, or --ipc=host."
    if found.shared_memory is None or found.shared_memory < HEARTBEATS:
        free = "is missing" if found.shared_memory is None else f"has {found.shared_memory:,} bytes free"
        verdicts.append(Verdict("devices", FAILS, f"/dev/shm {free}", f"Ranks of one host talk through it. {cure}"))
    elif len(found.gpus) > 1 and found.shared_memory <= SHARED_MEMORY:
        said = f"/dev/shm has {found.shared_memory / 2**20:.0f} MiB free, little for NCCL on {len(found.gpus)} GPUs"
        verdicts.append(Verdict("devices", WARN, said, cure))
    return verdicts


PROGRAMS = ("ssh", "pdsh", "srun", "sbatch", "scontrol", "c++", "nvcc")


def programs(target: str, engine: str, compiles: bool) -> list[Verdict]:
    there = [name for name in PROGRAMS if shutil.which(name)]
    if not {"c++"} & set(there) and (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        there.append("c++")
    return judge_programs(there, target, engine, compiles)


def judge_programs(there: Collection[str], target: str, engine: str, compiles: bool) -> list[Verdict]:
    """Whether the programs that this way to start a run needs are `there`."""
    wanted: dict[str, Sequence[str]] = {
        "launch=ssh": ("ssh", "pdsh") if engine == "deepspeed" else ("ssh",),
        "launch=slurm": ("sbatch", "srun", "scontrol"),
        "model.compile=true": ("c++",),
    }
    needed = [f"launch={target}"] + (["model.compile=true"] if compiles else [])
    found = []
    for choice in needed:
        missing = [name for name in wanted.get(choice, ()) if name not in there]
        if missing:
            cure = "Install them on every host (Debian: openssh-client, pdsh, slurm-client, g++)."
            found.append(Verdict("programs", FAILS, f"{choice} needs {', '.join(missing)}", cure))
    absent = [name for name in PROGRAMS if name not in there]
    good = f"{', '.join(name for name in PROGRAMS if name in there) or 'none'} found"
    return worst("programs", found, good + (f"; {', '.join(absent)} not, and not needed here" if absent else ""))
