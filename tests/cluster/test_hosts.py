"""Hosts of network namespaces: that they are what they seem, and runs across them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Cluster, cluster


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts"), 2) as found:
        yield found


def test_hosts_have_names_processes_and_links_of_their_own(hosts: Cluster) -> None:
    first, second = hosts.hosts
    config = ["ssh", "-F", hosts.ssh_config, "-o", "BatchMode=yes"]
    there = first.run([*config, second.name, "hostname; ps ax | grep -c '[s]shd -D'; ls /dev/shm | wc -l"])
    assert there.stdout.split() == [second.name, "1", "0"], there.stderr
    assert second.processes() == []
    ping = f"import socket; socket.create_connection(({second.address!r}, 22), 1); print('there')"
    second.set_link("down")
    try:
        assert "there" not in first.run(["python3", "-c", ping]).stdout
    finally:
        second.set_link("up")
    assert "there" in first.run(["python3", "-c", ping]).stdout


def test_a_link_between_two_hosts_can_be_slow(hosts: Cluster) -> None:
    first, second = hosts.hosts
    copy = f"head -c 200000 /dev/zero | ssh -F {hosts.ssh_config} {second.name} 'wc -c'"
    hosts.slow(0, 1, "512kbit")
    try:
        began = time.monotonic()
        assert first.run(["sh", "-c", copy]).stdout.split() == ["200000"]
        assert time.monotonic() - began > 2, "two hundred kilobytes take three seconds at 512 kbit/s"
    finally:
        first.fast()
        second.fast()
