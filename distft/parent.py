"""A process that ends when the one that started it has ended, so that nothing is left behind on a node."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

PARENT = "DISTFT_PARENT"  # in the environment of a controller's processes: its process id
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def follow(parent: int, number: int = signal.SIGTERM) -> None:
    """Have `number` sent to this process when process `parent` ends; at once where it has ended already.

    A child asks the kernel. Where another process stands between the two (a launcher), a thread waits on the pidfd.
    """
    if os.getppid() == parent:
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, number)
        if os.getppid() == parent:  # else it ended before the kernel was asked
            return
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os.kill(os.getpid(), number)
        return
    except OSError:  # a kernel without pidfd
        return

    def wait() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, name="watch of the controller", daemon=True).start()


def follow_controller() -> None:
    """Follow the controller that the environment names, if one does."""
    parent = os.environ.pop(PARENT, "")  # children of this process have this process for a parent
    if parent:
        follow(int(parent))
