"""`launch=ssh` over two hosts: each engine trains the curve of one node, ends as asked, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from distft import errors
from tests.cluster.hosts import Cluster, Host, cluster
from tests.faults.runs import PATIENCE, ROOT, Shop, records, result

SECRETS = {"WANDB_API_KEY": "of-wandb-0123456789abcdef", "HF_TOKEN": "of-the-hub-0123456789abcdef"}
QUICK = "-o ServerAliveInterval=1 -o ConnectTimeout=2"  # a host that went silent is lost after 4 s, not 20
STEPS = ["max_steps=40", "data.eval_fraction=0"]


@dataclass
class Trained:
    """A run whose controller works on the first host."""

    process: subprocess.Popen[str]
    hosts: list[Host]
    folder: Path

    def controller(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def wait_for_step(self, step: int) -> None:
        """Until a record of `step` is there."""
        deadline = time.monotonic() + PATIENCE
        while not any(record["step"] >= step for record in records(self.folder)):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.05)

    def shows_no_secret(self) -> None:
        """Once ranks are there: in no command line on any host, and in no file that others may read."""
        deadline = time.monotonic() + PATIENCE
        while not any("--prepared" in line for line in self.command_lines()):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "no rank ever started"
            time.sleep(0.5)
        assert not any(secret in line for line in self.command_lines() for secret in SECRETS.values())
        for host in self.hosts:
            readable = ["find", "/dev/shm", "-type", "f", "-perm", "/go+r"]
            assert host.run([*readable, "-exec", "grep", "-l", "0123456789", "{}", "+"]).stdout == ""

    def command_lines(self) -> Iterator[str]:
        for host in self.hosts:
            for process in host.everything():
                try:
                    yield " ".join(process.cmdline())
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue

    def end(self) -> tuple[int, str]:
        text, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, text

    def leaves_nothing(self) -> None:
        """Launchers end a moment after what they launched."""
        deadline, left = time.monotonic() + 20, [""]
        alive = [host for host in self.hosts if host.init.poll() is None]
        while left and time.monotonic() < deadline:
            left = [f"{host.name}: {process}" for host in alive for process in host.processes()]
            time.sleep(0.1)
        assert left == []
        assert [host.run(["ls", "/dev/shm"]).stdout for host in alive] == [""] * len(alive)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts"), 2) as found:
        yield found


@contextmanager
def started(found: Cluster, command: list[str | Path], folder: Path) -> Iterator[Trained]:
    options = {"DISTFT_SSH_OPTIONS": f"{found.environment['DISTFT_SSH_OPTIONS']} {QUICK}"}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        found.hosts[0].inside(command),
        env={**os.environ, **found.environment, **options, **own, **SECRETS},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield Trained(process, found.hosts, folder)
    finally:
        if process.poll() is None:
            for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                member.kill()
            process.communicate()


def over_ssh(found: Cluster, shop: Shop, name: str, *words: str) -> list[str | Path]:
    hostfile = found.hostfile(found.folder / "hostfile")
    ssh = ["launch=ssh", f"launch.hostfile={hostfile}"]
    return [sys.executable, ROOT / "train.py", *shop.words(name, *STEPS, *ssh, *words)]


@pytest.fixture(scope="module")
def curve(shop: Shop) -> list[float]:
    """The losses of the same run on one node."""
    code, text = shop.run("one-node", *STEPS, "strategy=ddp")
    assert code == 0, text
    return losses(shop.folder / "one-node")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


def test_unfit_hosts_are_told_together_and_nothing_is_started(hosts: Cluster, shop: Shop, tmp_path: Path) -> None:
    second, folder = hosts.hosts[1], shop.folder / "refused"
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=99\nnode9 slots=1\n")
    folder.mkdir()
    second.run(["mount", "-t", "tmpfs", "tmpfs", folder])
    try:
        command = over_ssh(hosts, shop, "refused", f"launch.hostfile={tmp_path / 'hostfile'}")
        with started(hosts, command, folder) as run:
            code, text = run.end()
            run.leaves_nothing()
    finally:
        second.run(["umount", folder])
    assert code == errors.USER_MISTAKE, text
    assert "distft: 3 problems:" in text
    assert "node9: it cannot be reached: " in text
    assert f"node2: run.dir={folder} is not seen there as it is here." in text
    assert "node2: slot 98 is used (they count from 0), but it has" in text
    assert "Traceback" not in text


def test_torchrun_then_deepspeed_then_by_hand(hosts: Cluster, shop: Shop, curve: list[float]) -> None:
    """One run, stopped twice: fsdp by a torchrun a host, zero2 by deepspeed's launcher, and by that typed by hand."""
    folder = shop.folder / "stopped"
    for engine, strategy in (("torchrun", "fsdp"), ("deepspeed", "zero2")):
        before = len(losses(folder))
        command = over_ssh(hosts, shop, "stopped", f"launch.engine={engine}", f"strategy={strategy}")
        with started(hosts, command, folder) as run:
            run.shows_no_secret()
            run.wait_for_step(before + 3)
            run.controller().send_signal(signal.SIGTERM)
            code, text = run.end()
            run.leaves_nothing()
        assert code == errors.SAVED_AFTER_SIGNAL, text
        assert result(folder)["status"] == "saved_after_signal"
    launcher = ["-m", "deepspeed.launcher.runner", f"--hostfile={hosts.folder / 'hostfile'}", "--no_ssh_check"]
    launcher += ["--master_addr", hosts.hosts[0].address, str(ROOT / "train.py")]
    command = [sys.executable, *launcher, *shop.words("stopped", *STEPS, "strategy=zero2")]
    with started(hosts, command, folder) as run:
        code, text = run.end()
        run.leaves_nothing()
    assert code == 0, text
    assert losses(folder) == pytest.approx(curve, rel=1e-5)


def test_a_host_is_lost_and_the_others_go_on(shop: Shop, curve: list[float], tmp_path: Path) -> None:
    """zero3 by distft itself: the curve is that of one node, also after the run goes on with what is left."""
    folder = shop.folder / "lost"
    more = ["strategy=zero3", "checkpoint.every=2", "checkpoint.background=false"]
    more += ["launch.max_restarts=1", "launch.min_ranks=1", "launch.restart_seconds=0"]
    with cluster(tmp_path / "hosts", 2) as found, started(found, over_ssh(found, shop, "lost", *more), folder) as run:
        run.shows_no_secret()
        run.wait_for_step(5)
        found.hosts[1].die()
        code, text = run.end()
        run.leaves_nothing()
    assert code == 0, text
    assert text.count("host node2 was lost in the middle of the run (Timeout, server node2 not responding)") == 1
    assert "with 1 rank in 0 s" in text
    assert "Traceback" not in text
    assert result(folder)["status"] == "done"
    assert losses(folder) == pytest.approx(curve, rel=1e-5)
