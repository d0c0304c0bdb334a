"""What ranks that were started one by one settle before their process group exists.

They talk through the rendezvous store alone: who is here, whether all have the same configuration, which folder is the
run's, whether every host sees it, and that preflight is done. No collective waits, so no timeout of theirs runs.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distft.errors import BUG, Stalled, Stop, UserMistake
from distft.launch.topology import Place, checked_host

if TYPE_CHECKING:
    from torch.distributed import Store

SEE_SECONDS = 30.0  # how long a host looks for the token file: network file systems cache folder contents

SEE_OFF_SECONDS = 3.0
REPORT_SECONDS = 10.0  # how long a rank with a problem waits for rank 0, which may have the same and never come


class Elsewhere(Stop):
    """Another rank has the reason and has said it; this one ends quietly with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def connect(place: Place, seconds: float) -> Store:
    """The store of `env://`, without waiting for all ranks: who is missing can then be named.

    Raises:
        Stalled: rank 0's store could not be reached in `seconds`.
    """
    from torch.distributed import DistError, TCPStore

    # torchrun serves the store itself; all ranks are its clients.
    serves = place.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = checked_host(os.environ.get("MASTER_ADDR", "127.0.0.1")), os.environ.get("MASTER_PORT", "")
    if not port.isdigit():
        raise UserMistake("RANK is set, but not MASTER_PORT. Start ranks with a launcher: deepspeed, torchrun or srun.")
    try:
        return TCPStore(
            address,
            int(port),
            place.size,
            serves,
            datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistError as error:
        reason = str(error).splitlines()[0]
        if serves and "EADDRINUSE" in reason:
            raise PortTaken(
                f"Rank 0 on {place.host} cannot serve the store: port {port} is taken. Set MASTER_PORT to a free one."
            ) from None
        raise Stalled(
            f"Rank {place.rank} on {place.host} cannot {'serve' if serves else 'reach'} the store at {address}:{port} "
            f"({reason}). launch.start_timeout={seconds:g} s is how long it tries; a port in use or a firewall may be "
            "the cause."
        ) from None


def report(place: Place, problem: str) -> None:
    """Tell rank 0 that this rank cannot start, if rank 0 itself could: else it has said the same already."""
    if not is_served(REPORT_SECONDS):  # torch would say so in many lines, and import for seconds before
        return
    from torch.distributed import DistError

    try:
        store = connect(place, 10)
        store.wait(["config/0"], datetime.timedelta(seconds=10))
        store.set(f"config/{place.rank}", json.dumps({"host": place.host, "problem": problem}))
    except (DistError, RuntimeError, Stop):
        return


def is_served(seconds: float) -> bool:
    """Whether somebody listens at the rendezvous, now or within `seconds`."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "")
    deadline = time.monotonic() + seconds
    while port.isdigit() and time.monotonic() < deadline:
        try:
            socket.create_connection((address, int(port)), timeout=seconds).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False


class PortTaken(Stalled):
    """Another process listens on the port that this start was to use."""


class Agreement:
    """The exchange of one start. Every method is called by every rank, in this order; rank 0 decides."""

    def __init__(self, place: Place, store: Store, seconds: float) -> None:
        self.place, self.store = place, store
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds

    def left(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(0.1, self.deadline - time.monotonic()))

    @contextmanager
    def decided(self, key: str) -> Iterator[None]:
        """Rank 0's part: a failure in it is published, so that the others end with it."""
        try:
            yield
        except BaseException as error:
            self.store.set(key, json.dumps({"code": error.exit_code if isinstance(error, Stop) else BUG}))
            self.see_off()
            raise

    def see_off(self) -> None:
        """The store ends with rank 0's process: let the others read their answer first."""
        from torch.distributed import DistError

        try:
            others = [f"left/{rank}" for rank in range(1, self.place.size)]
            self.store.wait(others, datetime.timedelta(seconds=SEE_OFF_SECONDS))
        except (DistError, RuntimeError):
            return

    def answer(self, key: str) -> dict[str, str | int]:
        """What rank 0 decided.

        Raises:
            Elsewhere: rank 0 failed and says why.
            Stalled: it did not decide in time, or is gone.
        """
        from torch.distributed import DistError

        try:
            self.store.wait([key], self.left())
            found = json.loads(self.store.get(key))
        except (DistError, RuntimeError):
            raise Stalled(
                f"Rank {self.place.rank} on {self.place.host} waited for rank 0 in vain (launch.start_timeout="
                f"{self.seconds:g} s); rank 0's output says more."
            ) from None
        if found.get("code"):
            self.store.set(f"left/{self.place.rank}", "")
            raise Elsewhere(found["code"])
        return dict(found)

    def reports(self, key: str) -> dict[int, dict[str, str]]:
        """One report of every rank under `key/<rank>`. Raises Stalled with the ranks that are missing."""
        from torch.distributed import DistError

        names = [f"{key}/{rank}" for rank in range(self.place.size)]
        try:
            self.store.wait(names, self.left())
        except (DistError, RuntimeError):
            missing = [str(rank) for rank, name in enumerate(names) if not self.store.check([name])]
            raise Stalled(
                f"{len(missing)} of {self.place.size} ranks did not arrive within launch.start_timeout="
                f"{self.seconds:g} s: {', '.join(missing[:16])}{', …' if len(missing) > 16 else ''}. Look at the "
                "output of their hosts."
            ) from None
        return {rank: json.loads(self.store.get(name)) for rank, name in enumerate(names)}

    def tell(self, key: str, **values: str) -> None:
        self.store.set(f"{key}/{self.place.rank}", json.dumps({"host": self.place.host, **values}))

    def same_config(self, hash: str) -> None:
        """All ranks have read the same configuration."""
        self.tell("config", hash=hash)
        if not self.place.is_main:
            self.answer("config")
            return
        with self.decided("config"):
            reports = self.reports("config")
            failed = {rank: found for rank, found in reports.items() if found.get("problem")}
            if failed:
                rank, found = next(iter(failed.items()))
                raise UserMistake(f"Rank {rank} on {found['host']} cannot start: {found['problem']}")
            other = {rank: found for rank, found in reports.items() if found["hash"] != hash}
            if other:
                hosts = sorted({found["host"] for found in other.values()})
                raise UserMistake(
                    f"Ranks {', '.join(map(str, list(other)[:8]))} on {', '.join(hosts[:8])} have another "
                    "configuration than rank 0. Start all with the same command line and the same files in conf/ "
                    "and --config-dir."
                )
            self.store.set("config", "{}")

    def folder(self, make: Callable[[], Path]) -> Path:
        """The run folder: made by rank 0, seen by every rank."""
        if self.place.is_main:
            with self.decided("folder"):
                folder = make()
                token = folder / f".shared-{uuid.uuid4().hex}"
                token.write_text(token.name)
                self.store.set("folder", json.dumps({"folder": str(folder), "token": token.name}))
        else:
            answer = self.answer("folder")
            folder, token = Path(str(answer["folder"])), Path(str(answer["folder"]), str(answer["token"]))
        patience = min(SEE_SECONDS, self.left().total_seconds() / 2)
        self.tell("seen", folder=str(folder) if sees(token, patience) else "")
        if not self.place.is_main:
            self.answer("seen")
            return folder
        with self.decided("seen"):
            try:
                blind = sorted({found["host"] for found in self.reports("seen").values() if not found["folder"]})
            finally:
                token.unlink(missing_ok=True)
            if blind:
                raise UserMistake(
                    f"run.dir={folder} of {self.place.host} is not seen on {', '.join(blind)}: all nodes need one file "
                    "system. Set run.dir to a folder that they share."
                )
            self.store.set("seen", "{}")
        return folder

    def preflight(self, run: Callable[[], None]) -> None:
        """Rank 0 runs it, in this process and before any group exists; the others wait."""
        if self.place.is_main:
            with self.decided("preflight"):
                run()
                self.store.set("preflight", "{}")
        else:
            self.answer("preflight")


def sees(token: Path, patience: float) -> bool:
    """Whether a file that rank 0 wrote is there within `patience` seconds, with its content."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if token.read_text() == token.name:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
