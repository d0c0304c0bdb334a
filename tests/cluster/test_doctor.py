"""`distft doctor` on three hosts, one link of which is slow: it has to be named, and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Cluster, Host, cluster

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 150.0
WORDS = ["doctor.checks=[links,clock,disk]", "log=none"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts"), 3) as found:
        yield found


def torchrun(hosts: Cluster, number: int) -> list[str]:
    rendezvous = [f"--master-addr={hosts.hosts[0].name}", "--master-port=29517", f"--node-rank={number}"]
    nodes = [f"--nnodes={len(hosts.hosts)}", "--nproc-per-node=1"]
    return [sys.executable, "-m", "torch.distributed.run", *nodes, *rendezvous, "-m", "distft", "doctor"]


def by_hand(hosts: Cluster, number: int) -> list[str]:
    """As any other launcher would."""
    place = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": len(hosts.hosts), "LOCAL_WORLD_SIZE": 1}
    where = {"MASTER_ADDR": hosts.hosts[0].name, "MASTER_PORT": 29518}
    settings = [f"{name}={value}" for name, value in {**place, **where}.items()]
    return ["env", *settings, sys.executable, "-m", "distft", "doctor"]


def examine(hosts: Cluster, start: Any, folder: Path, *words: str) -> tuple[list[int], list[dict[str, str]], str]:
    """Start it on every host. Returns the exit codes, the verdicts and what the first one printed."""
    output = folder / "verdicts.json"
    words = (*WORDS, f"run.dir={folder}", f"doctor.output={output}", *words)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started: list[subprocess.Popen[str]] = []
    try:
        for number, host in enumerate(hosts.hosts):
            command = host.inside(["env", *(f"{name}={value}" for name, value in environment.items())])
            words_there = [*command, *start(hosts, number), *words]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(words_there, text=True, cwd=folder, **pipes))
        texts = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert output.exists(), "\n".join(texts)
    codes = [process.returncode for process in started]
    return codes, json.loads(output.read_text())["verdicts"], texts[0]


def links(verdicts: list[dict[str, str]]) -> list[dict[str, str]]:
    return [verdict for verdict in verdicts if verdict["what"] == "links"]


def nothing_is_left(hosts: list[Host]) -> bool:
    return not [process for host in hosts for process in host.processes()]


def test_the_slow_link_is_named_under_torchrun(hosts: Cluster, tmp_path: Path) -> None:
    one, other = hosts.hosts[0], hosts.hosts[2]
    hosts.slow(0, 2, "8mbit")
    try:
        codes, verdicts, text = examine(hosts, torchrun, tmp_path, "doctor.slow_link=60")
    finally:
        one.fast()
        other.fast()
    [found] = links(verdicts)
    assert found["state"] == "warn", text
    assert found["said"].startswith(f"the link rank 0 on {one.name} - rank 2 on {other.name}: "), text
    assert "times slower than the quick pairs between hosts" in found["said"]
    assert f"warn      links: {found['said']}\n" in text
    assert codes == [0, 0, 0], "a slow link fails no run"
    assert nothing_is_left(hosts.hosts)


def test_a_bandwidth_that_is_asked_for_fails_and_other_links_are_not_blamed(hosts: Cluster, tmp_path: Path) -> None:
    hosts.slow(0, 1, "8mbit")
    try:
        codes, verdicts, text = examine(hosts, by_hand, tmp_path, "doctor.min_bandwidth=0.005")
    finally:
        hosts.hosts[0].fast()
        hosts.hosts[1].fast()
    [found] = links(verdicts)
    assert found["state"] == "fails", text
    assert "node1 - rank 1 on node2" in found["said"]
    assert "rank 2" not in found["said"]
    assert codes == [3, 3, 3]
    states = {verdict["what"]: verdict["state"] for verdict in verdicts}
    assert states["clock"] == states["shared"] == states["same everywhere"] == "ok", text


def over_ssh(hosts: Cluster, folder: Path, *words: str) -> tuple[int, list[dict[str, str]], str]:
    """`distft doctor launch=ssh` typed on the first host."""
    output = folder / "verdicts.json"
    words = (*WORDS, f"run.dir={folder}", f"doctor.output={output}", *words)
    ssh = ["launch=ssh", f"launch.hostfile={hosts.hostfile(folder / 'hostfile')}"]
    environment = {**hosts.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distft", "doctor", *ssh, *words]
    finished = hosts.hosts[0].run(command, PATIENCE, **environment)
    text = finished.stdout + finished.stderr
    assert output.exists(), text
    return finished.returncode, json.loads(output.read_text())["verdicts"], text


def test_equal_links_are_all_well_over_ssh(hosts: Cluster, tmp_path: Path) -> None:
    """Negative control, and one command for all hosts. Links of one machine are as quick as its busy cores let them be:
    three times slower may be chance here, sixty times is not, and the slow link of the other trials is that."""
    code, verdicts, text = over_ssh(hosts, tmp_path, "doctor.checks=[links]", "doctor.slow_link=60")
    [found] = links(verdicts)
    assert found["state"] == "ok", text
    assert found["said"].startswith("between hosts, 3 pairs by gloo: ")
    assert code == 0
    assert nothing_is_left(hosts.hosts)


def test_a_host_that_is_not_reached_is_a_verdict(hosts: Cluster, tmp_path: Path) -> None:
    (tmp_path / "others").write_text("node1 slots=1\nnode9 slots=1\n")
    code, verdicts, text = over_ssh(hosts, tmp_path, f"launch.hostfile={tmp_path / 'others'}")
    assert code == 3, text
    assert [(verdict["what"], verdict["state"]) for verdict in verdicts] == [("hosts", "fails")]
    assert "node9: it cannot be reached" in text
