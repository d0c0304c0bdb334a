"""What a host of a run can tell about itself, asked by ssh.py before anything is started there."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from distft.launch.agree import sees
from distft.launch.lock import machine
from distft.launch.topology import count_gpus

PACKAGES = ("torch", "transformers", "deepspeed", "peft")
SEE_SECONDS = 5.0  # network file systems cache folder contents
REACH_SECONDS = 5.0

listening: list[socket.socket] = []  # on the port that the run's rendezvous is to have


def memory_folder() -> Path:
    """A file system in memory, of this host alone."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def look_around(run_dir: str, token: str, cwd: str) -> dict[str, Any]:
    """Everything that can be told without another host. `token`: a file that was written into the run folder."""
    seen = sees(Path(run_dir, token), SEE_SECONDS)
    temporary = tempfile.gettempdir()
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "address": os.environ.get("SSH_CONNECTION", "   ").split(" ")[2],
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "code": hash_of_code(),
        "sees": seen,
        "config": hash_of(Path(run_dir, "config.yaml")) if seen else "",
        "cwd": Path(cwd).is_dir(),
        "gpus": count_gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "rooms": {str(path): shutil.disk_usage(path).free for path in {temporary, str(memory_folder())}},
    }


def clock() -> dict[str, Any]:
    return {"time": time.time()}


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def hash_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def hash_of_code() -> str:
    """Of the sources of this very distft: two checkouts may have one version."""
    root = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def listen(port: int) -> dict[str, Any]:
    """Hold a port until ranks are started. `port` 0: any that is free."""
    stop_listening()
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    listening.append(server)
    return {"port": server.getsockname()[1]}


def stop_listening() -> None:
    while listening:
        listening.pop().close()


def reach(address: str, port: int) -> dict[str, Any]:
    """Connect to the first host's port. Tells the network interface that leads there."""
    try:
        with socket.create_connection((address, port), timeout=REACH_SECONDS) as connection:
            own = connection.getsockname()[0].removeprefix("::ffff:")
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"interface": interface_of(own)}


def interface_of(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return ""


def missing(paths: list[str]) -> dict[str, Any]:
    """Which of these paths are not here."""
    return {"missing": [path for path in paths if not Path(path).exists()]}


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def launcher_of(pid: int) -> int:
    """The process of DeepSpeed's launcher that started a rank on this host; 0 where there is none."""
    try:
        parent = psutil.Process(pid).parent()
        return int(parent.pid) if parent is not None and "deepspeed.launcher.launch" in parent.cmdline() else 0
    except psutil.Error:
        return 0


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "look_around": look_around,
    "clock": clock,
    "listen": listen,
    "reach": reach,
    "missing": missing,
}
