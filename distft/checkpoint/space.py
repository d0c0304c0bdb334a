"""Whether a checkpoint fits on its disk, asked before a byte of it is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distft.checkpoint.ranks import DiskFull

MARGIN = 1 << 20  # bytes left for the manifest, metrics and logs


def check_space(run_dir: Path, step: int, num_bytes: int) -> None:
    """
    Args:
        num_bytes: of all ranks' files of the checkpoint of `step`.

    Raises:
        DiskFull: they do not fit.
    """
    free = shutil.disk_usage(run_dir).free
    if num_bytes + MARGIN > free:
        raise DiskFull(
            f"The checkpoint of step {step} needs {size(num_bytes)}, but the disk of run.dir "
            f"({mount_of(run_dir)}) has {size(free)} free."
        )


def mount_of(path: Path) -> Path:
    """Where the file system that holds `path` is mounted."""
    path = path.resolve()
    while not os.path.ismount(path):
        path = path.parent
    return path


def size(num_bytes: int) -> str:
    """12,345,678 bytes (12.3 MB): exact, and to be read."""
    scale, unit = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes:,} bytes ({num_bytes / scale:.1f} {unit})"
