"""What ranks exchange through the rendezvous store: who is here, whose clock is off, what each has found."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.doctor.verdict import FAILS, OK, WARN, Verdict, listed
from distft.launch.agree import sees
from distft.launch.topology import Place

if TYPE_CHECKING:
    from torch.distributed import Store

EXCHANGES = 5  # of the time, with every host; the quickest counts
NOTICED, TOO_MUCH = 1.0, 30.0  # seconds that a clock may be off: logs and deadlines suffer; locks and certificates too


class Together:
    """The store of one look, as one rank sees it. Every method is called by every rank, all in one order."""

    def __init__(self, place: Place, store: Store, seconds: float) -> None:
        self.place, self.store, self.seconds = place, store, seconds

    def put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def take(self, key: str, seconds: float | None = None) -> Any:
        """
        Raises:
            RuntimeError: it did not come in time (torch's DistStoreError is one).
        """
        self.store.wait([key], datetime.timedelta(seconds=seconds or self.seconds))
        return json.loads(self.store.get(key))

    def everyone(self, key: str, value: Any, seconds: float | None = None) -> dict[int, Any]:
        """What every rank puts under this key, at every rank; ranks that are too late are left out."""
        self.put(f"{key}/{self.place.rank}", value)
        if not self.place.is_main:
            found = self.take(f"{key}/all", 2 * (seconds or self.seconds))
            return {int(rank): value for rank, value in found.items()}
        deadline, all_found = time.monotonic() + (seconds or self.seconds), {}
        for rank in range(self.place.size):
            try:
                all_found[rank] = self.take(f"{key}/{rank}", max(0.1, deadline - time.monotonic()))
            except RuntimeError:
                continue
        self.put(f"{key}/all", all_found)
        return all_found

    def side_by_side(self, key: str, size: int, seconds: float) -> None:
        """Wait for `size` ranks to come here."""
        if self.store.add(f"{key}/count", 1) == size:
            self.store.set(f"{key}/all", "")
        self.store.wait([f"{key}/all"], datetime.timedelta(seconds=seconds))

    def clock(self, leaders: Mapping[int, str]) -> list[Verdict]:
        """How far the clocks of these ranks, by their hosts' names, are from rank 0's (Cristian 1989)."""
        if not self.place.is_main:
            if self.place.rank in leaders:
                for number in range(EXCHANGES):
                    key = f"clock/{self.place.rank}/{number}"
                    self.take(f"{key}/asked")
                    self.put(f"{key}/told", time.time())
            return []
        off, blind = {}, 0.0
        for rank, host in leaders.items():
            if rank == self.place.rank:
                continue
            took, off[host] = min(self.ask(f"clock/{rank}/{number}") for number in range(EXCHANGES))
            blind = max(blind, took / 2)
        return judge_clocks(off, blind)

    def ask(self, key: str) -> tuple[float, float]:
        """Seconds that one exchange took, and how far the other's clock was ahead of ours in its middle."""
        before, started = time.time(), time.perf_counter()
        self.put(f"{key}/asked", "")
        theirs = self.take(f"{key}/told")
        took = time.perf_counter() - started
        return took, theirs - (before + took / 2)

    def shared(self, folder: Path, leaders: Mapping[int, str], patience: float) -> list[Verdict]:
        """Whether every host sees a file that rank 0 writes into `folder`."""
        token = folder / f".distft-doctor-{uuid.uuid4().hex}"
        if self.place.is_main:
            try:
                token.write_text(token.name)
            except OSError as error:
                self.put("token", "")
                return [Verdict("shared", FAILS, f"{folder} cannot be written: {error.strerror}", "Set run.dir.")]
            self.put("token", str(token))
        named = self.take("token")
        if self.place.rank in leaders and not self.place.is_main and named:
            self.put(f"seen/{self.place.rank}", sees(Path(named), patience))
        if not self.place.is_main:
            return []
        try:
            blind = [host for rank, host in leaders.items() if rank and not self.take(f"seen/{rank}", patience + 10)]
        finally:
            token.unlink(missing_ok=True)
        return judge_shared(folder, blind, len(leaders))


def judge_clocks(off: Mapping[str, float], blind: float) -> list[Verdict]:
    """off: seconds by host that its clock is ahead of rank 0's. blind: what the network's delay hides of it."""
    wrong = {host: seconds for host, seconds in off.items() if abs(seconds) - blind > NOTICED}
    if not wrong:
        most = max((abs(seconds) for seconds in off.values()), default=0.0)
        return [Verdict("clock", OK, f"at most {max(most, blind) * 1e3:.0f} ms apart on {len(off) + 1} hosts")]
    state = FAILS if max(map(abs, wrong.values())) > TOO_MUCH else WARN
    told = [f"{host} is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}" for host, seconds in wrong.items()]
    return [Verdict("clock", state, listed(told), "Set the clocks by NTP (chronyc tracking, timedatectl).")]


def judge_shared(folder: Path, blind: Sequence[str], num_hosts: int) -> list[Verdict]:
    if not blind:
        return [Verdict("shared", OK, f"all {num_hosts} hosts see {folder}")]
    cure = "All hosts need one file system: set run.dir to a folder that they share."
    return [Verdict("shared", FAILS, f"what rank 0 writes into {folder} is not seen on {listed(blind)}", cure)]
