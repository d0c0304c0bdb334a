"""What is started on the hosts of a run, and what a dry run shows of it. Pure, besides this process's environment."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.config.schema import Run
from distft.launch.hostfile import Host, include_of, ranks_of, rendered
from distft.launch.lock import LAUNCH
from distft.launch.session import ssh_options
from distft.launch.start import Command, package_path, rank_words, verb_command

HOSTFILE = "logs/hostfile"  # in the run folder: for DeepSpeed's launcher
PORT = 29500  # shown by a dry run, which asks no host
# Of this process's variables those that a run depends on. A login over ssh has none of them.
PREFIXES = (
    "WANDB_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "NCCL_", "GLOO_",
    "UCX_", "FI_", "CUDA_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "DISTFT_", "DEEPSPEED_", "DS_", "PYTHON",
    "LD_LIBRARY_PATH", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
OWN = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_", "DISTFT_SSH_OPTIONS")  # of this machine alone: slots name the devices


def forwarded(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of this process that every host is given: by PREFIXES, and `launch.variables`."""
    found = {name: value for name, value in environment.items() if name.startswith(PREFIXES)}
    found = {name: value for name, value in found.items() if not name.startswith(OWN)}
    return found | {name: environment[name] for name in names if name in environment}


def variables_of(host: Host, facts: Mapping[str, Any], interface: str, run: Run) -> dict[str, str]:
    """The variables of all ranks on a host. `interface`: of the network that leads to the first host."""
    found = forwarded(run.launch.variables)
    found.setdefault("OMP_NUM_THREADS", str(max(1, facts["cores"] // len(host.slots))))
    if run.launch.interface:
        found |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    elif interface:  # a host's name often resolves to an address that no other host reaches
        found.setdefault("GLOO_SOCKET_IFNAME", interface)
    return found


def commands(
    engine: str,
    hosts: Sequence[Host],
    address: str,
    port: int,
    run_dir: Path,
    resume: str | None,
    words: Sequence[str] = (),
) -> dict[str, list[tuple[int, Command]]]:
    """By host the processes to start there: the first rank that each is or starts, and its command.

    `words`: what a rank is told behind `distft`, where that is not to train.
    """
    words = words or rank_words(run_dir / "config.yaml", resume)
    found: dict[str, list[tuple[int, Command]]] = {}
    size = sum(len(host.slots) for host in hosts)
    for number, (host, ranks) in enumerate(zip(hosts, ranks_of(hosts).values(), strict=True)):
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots))}  # no harm where there is no GPU
        if engine == "torchrun":
            its = [(ranks[0], torchrun(number, len(hosts), len(ranks), address, port, words))]
        else:
            places = [(rank, rank - ranks[0], len(ranks)) for rank in ranks]
            its = [(place[0], one_rank(*place, size, address, port, words)) for place in places]
        found[host.name] = [(rank, command.also(devices)) for rank, command in its]
    return found


def one_rank(
    rank: int, local_rank: int, local_size: int, size: int, address: str, port: int, words: Sequence[str]
) -> Command:
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    return Command([sys.executable, "-m", "distft", *words], {**package_path(), **environment})


def torchrun(node: int, num_nodes: int, num_ranks: int, address: str, port: int, words: Sequence[str]) -> Command:
    """One for each host; the first serves the rendezvous."""
    launcher = [f"--nnodes={num_nodes}", f"--node-rank={node}", f"--nproc-per-node={num_ranks}"]
    launcher += [f"--master-addr={address}", f"--master-port={port}"]
    return Command([sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "distft", *words], package_path())


def deepspeed_command(
    hosts: Sequence[Host], address: str, port: int, run: Run, run_dir: Path, resume: str | None, token: str
) -> Command:
    """DeepSpeed's launcher on this machine, which goes to the hosts with pdsh. `token`: of the variables there."""
    launcher = [f"--hostfile={run_dir / HOSTFILE}", f"--include={include_of(hosts)}", "--force_multi"]
    launcher += [f"--master_addr={address}", f"--master_port={port}", "--no_ssh_check", "--no_local_rank"]
    words = [*rank_words(run_dir / "config.yaml", resume), *([f"--environment={token}"] if token else [])]
    options = shlex.join(ssh_options(run.launch.ssh_port))
    return Command(
        [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, "--module", "distft", *words],
        {**package_path(), "PDSH_SSH_ARGS_APPEND": options},
    )


def write_hostfile(run_dir: Path, hosts: Sequence[Host]) -> None:
    """What `deepspeed_command` names."""
    (run_dir / HOSTFILE).write_text(rendered(hosts), encoding="utf-8")


def problems_for_pdsh(run_dir: Path, pdsh: str | None) -> list[str]:
    """What keeps DeepSpeed's launcher from working over several hosts."""
    problems = []
    if pdsh is None:
        problems.append("launch.engine=deepspeed needs pdsh on this machine. Install it, or set launch.engine=direct.")
    # It hands its words to a shell on each host as they are.
    if shlex.quote(str(run_dir)) != str(run_dir):
        problems.append(
            f"run.dir={run_dir} holds characters that mean something to a shell, and pdsh does not quote them. Name "
            "another folder, or set launch.engine=direct."
        )
    return problems


def shown(run: Run, run_dir: Path, hosts: Sequence[Host], resume: str | None) -> str:
    """What would run, as a script of shell that can be copied."""
    launch = run.launch
    address = hosts[0].name if launch.address == "auto" else launch.address
    port = PORT if launch.port == "auto" else int(launch.port)
    ranks = ranks_of(hosts)
    names = set(forwarded(launch.variables)) - {LAUNCH}  # the last is of this very process
    lines = [
        *(f"# {host.name}: {told(ranks[host.name])} on slots {', '.join(map(str, host.slots))}" for host in hosts),
        f"# Every host is given these variables, over ssh's input: {', '.join(sorted(names)) or 'none'}",
    ]
    if launch.address == "auto" or launch.port == "auto":
        lines.append("# The address and a free port are asked of the first host; here stand its name and a usual port.")
    lines.append(str(verb_command("preflight", str(run_dir / "config.yaml"))))
    if launch.engine == "deepspeed":
        lines.append(str(deepspeed_command(hosts, address, port, run, run_dir, resume, "")))
        return "\n".join(lines)
    for host, its in commands(launch.engine, hosts, address, port, run_dir, resume).items():
        for _, command in its:
            settings = [f"{name}={value}" for name, value in command.environment.items()]
            there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *settings, *command.argv])}"
            lines.append(f"{shlex.join(['ssh', '-T', *ssh_options(launch.ssh_port), '--', host, there])} &")
    return "\n".join([*lines, "wait"])


def told(ranks: range) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
