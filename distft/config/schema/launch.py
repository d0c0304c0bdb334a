from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.config.schema.knob import choice

ALERTS = ("stall", "spike", "end")


@dataclass
class Launch:
    target: str = choice("local", "ssh", "slurm")
    """Where the workers run. local: on this machine; ssh: on the hosts of a file; slurm: in a job that goes into
    Slurm's queue, or, inside of an allocation, on its nodes."""

    ranks: Any = "auto"
    """Worker processes; auto: one a GPU, or one where there is none; with ssh one a slot."""

    engine: str = choice("direct", "deepspeed", "torchrun")
    """Who starts the workers. direct: distft itself, which keeps exit codes and forwards signals."""

    max_restarts: int = 0
    """How often the ranks are started again, from the last sound checkpoint, after a crash or a stall."""

    min_ranks: int | None = None
    """How few ranks may go on where not all can be started again; default: all are needed."""

    restart_seconds: float = 1.0
    """Wait before the first restart; each further one waits twice as long, up to a minute."""

    deadline: Any = "auto"
    """When all ranks save and end: seconds or [days-]HH:MM:SS from the start, or a time such as 2030-01-31T18:00;
    Slurm's end of the job where that is earlier. auto: Slurm's alone; none: neither."""

    requeue: Any = choice("auto", True, False)  # noqa: RUF009
    """Whether a Slurm job goes back into the queue once its run was stopped and saved. auto: where Slurm asked for it
    (SIGUSR1, its end of the job); true: also after SIGTERM and launch.deadline, which may be a person's wish."""

    dry_run: bool = False
    """Print the exact commands and stop."""

    start_timeout: float = 600.0
    """Seconds in which preflight has to end and every rank has to arrive."""

    # What follows is for target=ssh alone.

    hostfile: str | None = None
    """Hosts and their slots in DeepSpeed's form: a line `node01 slots=8` for each. A rank is a slot."""

    include: str | None = None
    """Slots to use of the hostfile, such as node01@node02:0,2: all of node01, two of node02. Default: all."""

    exclude: str | None = None
    """Slots not to use, written like include."""

    ssh_port: int | None = None
    """Port of sshd on the hosts; default: what ~/.ssh/config says."""

    address: str = "auto"
    """Where the ranks meet: the first host's address for the others. auto: where ssh reached it."""

    port: Any = "auto"
    """Port on the first host where the ranks meet; auto: one that is free."""

    interface: str | None = None
    """Network interface for NCCL and gloo; default: NCCL chooses, gloo takes the one that leads to the first host."""

    variables: list[str] = field(default_factory=list)
    """More environment variables that every host is given, besides WANDB_*, HF_*, NCCL_* and their like."""

    # What follows is for target=slurm alone.

    nodes: int = 1
    """Nodes of the Slurm job."""

    gpus_per_node: int | None = None
    """GPUs on each node, one rank each. Without it launch.ranks ranks share the nodes, on their CPUs."""

    cpus_per_rank: int | None = None
    """CPU cores of each rank; default: what the cluster gives a task."""

    partition: str | None = None
    """Slurm partition (queue); default: the cluster's."""

    account: str | None = None
    """Slurm account that pays."""

    qos: str | None = None
    """Slurm quality of service."""

    time: Any = None
    """Time limit of the job as [days-]HH:MM:SS; default: the partition's."""

    signal_seconds: int = 120
    """Seconds before the time limit at which Slurm asks all ranks to save and end."""

    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, such as --exclusive, --mem=0 or --constraint=h100."""

    setup: list[str] = field(default_factory=list)
    """Lines of shell before the ranks start, such as `module load cuda`; they run on the job's first node."""

    container: str | None = None
    """Image that the ranks run in: a name or .sqsh file for pyxis (srun --container-image), or a .sif for apptainer."""

    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees besides the run folder: /data or /outside:/inside."""


@dataclass
class Log:
    tracker: str = choice("wandb", "tensorboard", "none")
    """Besides metrics.jsonl and the progress bar. wandb without a key writes offline runs."""

    every: int = 10
    """Steps between training records; the first and the last step always."""

    project: str = "distft"
    """W&B project."""

    group: str | None = None
    """W&B group; default: the sweep's name in a sweep."""

    tags: list[str] = field(default_factory=list)
    """W&B tags."""

    alerts: list[str] = field(default_factory=lambda: list(ALERTS))
    """What W&B sends an alert for, to who has switched them on there: stall, spike (of the loss), end."""


@dataclass
class RunFolder:
    name: str | None = None
    """Default: the data's name."""

    dir: str | None = None
    """Default: runs/<name>-<time>."""
