"""Hosts on one machine: network namespaces joined by a bridge, with an sshd, process ids and a host name each.

Launchers clean up by name, so each host sees its own processes alone. /dev/shm and /run are each host's own; the rest
of the file system is shared, as run folders are on a cluster. Nothing is added to the machine's own network, and all
of it goes with the first process of each host.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.required import cannot

NETWORK = "10.71.7"
BOOT_SECONDS = 20.0
NUMBERS = itertools.count()  # for names of namespaces: a test run may have several clusters
PROGRAMS = ("ip", "tc", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen")

# The first process of a host. It reaps what is left to it, as any init does.
INIT = """
hostname "$NAME" && mount --bind "$FOLDER/hosts" /etc/hosts &&
mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount -t tmpfs tmpfs /dev/shm && chmod 1777 /dev/shm || exit 1
$SSHD -D -e -f "$FOLDER/$NAME.sshd" &
while :; do wait -n || sleep 0.2; done
"""


def words_of(command: Sequence[str | Path]) -> list[str]:
    return [str(word) for word in command]


def must(*command: str | Path) -> None:
    done = subprocess.run(words_of(command), capture_output=True, text=True, timeout=30)
    if done.returncode:
        cannot("cluster", f"{' '.join(words_of(command))}: {done.stderr.strip()}")


@dataclass
class Host:
    """One of the hosts."""

    name: str
    address: str
    network: str  # its network namespace
    init: subprocess.Popen[bytes]  # whose child is the host's process 1
    folder: Path  # of the cluster: keys and configurations
    filters: list[str] = field(default_factory=list)  # addresses to which its link is slow

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """The words that run a command there."""
        [first] = psutil.Process(self.init.pid).children()
        where = ["nsenter", f"--target={first.pid}", "--net", "--pid", "--mount", "--uts", f"--wdns={os.getcwd()}"]
        return [*where, "--", *words_of(command)]

    def run(
        self, command: Sequence[str | Path], seconds: float = 60.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(
            self.inside(command), capture_output=True, text=True, timeout=seconds, env={**os.environ, **environment}
        )

    def processes(self) -> list[psutil.Process]:
        """Everything that runs there, besides what makes it a host."""
        found = []
        for process in self.everything():
            try:
                if process.name() != "sshd" and process.parent() != psutil.Process(self.init.pid):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def everything(self) -> list[psutil.Process]:
        [first] = psutil.Process(self.init.pid).children()
        space = os.readlink(f"/proc/{first.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.NoSuchProcess):
                continue
        return found

    def set_link(self, state: str) -> None:
        """`up` or `down`: down, it is as if its cable were pulled."""
        must("ip", "-n", self.network, "link", "set", "eth0", state)

    def slow(self, rate: str, to: Host | None = None) -> None:
        """Let what it sends pass at no more than `rate`, such as `20mbit`: to one host alone, or to all."""
        shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        if to is None:
            must("tc", "-n", self.network, "qdisc", "add", "dev", "eth0", "root", *shape)
            return
        number = len(self.filters) + 1
        on = ["dev", "eth0"]
        if not self.filters:
            must("tc", "-n", self.network, "qdisc", "add", *on, "root", "handle", "1:", "htb")
        self.filters.append(to.address)
        kind = ["classid", f"1:{number}", "htb", "rate", rate]
        must("tc", "-n", self.network, "class", "add", *on, "parent", "1:", *kind)
        match = ["protocol", "ip", "u32", "match", "ip", "dst", f"{to.address}/32", "flowid", f"1:{number}"]
        must("tc", "-n", self.network, "filter", "add", *on, "parent", "1:", *match)

    def fast(self) -> None:
        """Take away what `slow` set."""
        self.filters.clear()
        subprocess.run(["tc", "-n", self.network, "qdisc", "del", "dev", "eth0", "root"], capture_output=True)

    def die(self) -> None:
        """Lose it as one that loses its power: no packet leaves any more, its processes are gone."""
        self.set_link("down")
        self.init.kill()
        self.init.wait()


@dataclass(frozen=True)
class Cluster:
    """Several hosts, each reachable from each by ssh under its name, with `ssh_config`."""

    hosts: list[Host]
    folder: Path

    @property
    def ssh_config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def environment(self) -> dict[str, str]:
        """What distft and pdsh need to find keys and ports that no ~/.ssh knows of."""
        options = f"-F {self.ssh_config}"
        return {"DISTFT_SSH_OPTIONS": options, "PDSH_SSH_ARGS_APPEND": options, "PDSH_RCMD_TYPE": "ssh"}

    def slow(self, one: int, other: int, rate: str) -> None:
        """Make the link between two hosts slow, in both directions, and no other."""
        self.hosts[one].slow(rate, self.hosts[other])
        self.hosts[other].slow(rate, self.hosts[one])

    def hostfile(self, path: Path, slots: int = 1) -> Path:
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path


@contextmanager
def cluster(folder: Path, num_hosts: int = 2, prefix: str = "node") -> Iterator[Cluster]:
    """Hosts `node1`, `node2`, … until the context is left, however that happens."""
    if os.geteuid() != 0:
        cannot("cluster", "network namespaces need root")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        cannot("cluster", f"not installed: {', '.join(missing)}")
    names = [f"{prefix}{number}" for number in range(1, num_hosts + 1)]
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
    write_files(folder, addresses)
    with ExitStack() as ends:
        switch = network(ends, "switch")
        must("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        must("ip", "-n", switch, "link", "set", "br0", "up")
        hosts = [boot(ends, folder, switch, name, address) for name, address in addresses.items()]
        found = Cluster(hosts, folder)
        for host in hosts:
            wait_for_sshd(host)
        yield found


def network(ends: ExitStack, name: str) -> str:
    """A network namespace whose name no other test run uses."""
    full = f"distft-{os.getpid()}-{next(NUMBERS)}-{name}"
    must("ip", "netns", "add", full)
    ends.callback(subprocess.run, ["ip", "netns", "del", full], capture_output=True)
    must("ip", "-n", full, "link", "set", "lo", "up")
    return full


def boot(ends: ExitStack, folder: Path, switch: str, name: str, address: str) -> Host:
    where = network(ends, name)
    must("ip", "-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", where)
    must("ip", "-n", switch, "link", "set", name, "master", "br0", "up")
    must("ip", "-n", where, "address", "add", f"{address}/24", "dev", "eth0")
    must("ip", "-n", where, "link", "set", "eth0", "up")
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"]) or "sshd"
    with (folder / f"{name}.log").open("ab") as log:
        own = ["unshare", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child"]
        init = subprocess.Popen(
            ["ip", "netns", "exec", where, *own, "bash", "-c", INIT],
            env={"PATH": os.environ["PATH"], "NAME": name, "FOLDER": str(folder), "SSHD": sshd},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    ends.callback(lambda: (init.kill(), init.wait()))
    return Host(name, address, where, init, folder)


def wait_for_sshd(host: Host) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    log = host.folder / f"{host.name}.log"
    while "Server listening" not in log.read_text():
        if host.init.poll() is not None or time.monotonic() > deadline:
            cannot("cluster", f"{host.name} does not start: {log.read_text()}")
        time.sleep(0.02)


def write_files(folder: Path, addresses: dict[str, str]) -> None:
    """Keys of the hosts and of the one user, and what ssh and sshd read: nothing of ~/.ssh is used."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("user", *addresses):
        must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / f"{name}.key")
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    (folder / "known_hosts").write_text(
        "".join(f"{name} {(folder / f'{name}.key.pub').read_text()}" for name in addresses)
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'user.key'}\nIdentitiesOnly yes\nUserKnownHostsFile {folder / 'known_hosts'}\n"
        "GlobalKnownHostsFile /dev/null\nUser root\n"
    )
    for name in addresses:
        (folder / f"{name}.sshd").write_text(
            f"HostKey {folder / f'{name}.key'}\nAuthorizedKeysFile {folder / 'user.key.pub'}\nStrictModes no\n"
            f"UsePAM no\nPermitRootLogin prohibit-password\nPidFile none\nPrintMotd no\nMaxStartups 100\n"
        )
