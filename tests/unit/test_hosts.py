"""The hosts of a run as text and numbers: hostfiles, filters, places, what is started, whether a host is fit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.config.check import check
from distft.config.load import compose
from distft.errors import Mistakes
from distft.launch.failure import End, first_cause
from distft.launch.fitness import judge
from distft.launch.fleet import hosts_of
from distft.launch.hostfile import Host, at, choose, include_of, limited, parse_hostfile, ranks_of, rendered
from distft.launch.hosts import commands, deepspeed_command, forwarded, problems_for_pdsh, shown, variables_of
from distft.launch.session import ssh_command
from distft.launch.worker import take_environment

HOSTS = [Host("node1", (0, 1)), Host("node2", (1,))]
ROOT = Path(__file__).resolve().parents[2]


def test_a_hostfile_is_deepspeeds() -> None:
    """Read as its own launcher reads it."""
    from deepspeed.launcher.runner import _parse_hostfile

    for text in ("node1 slots=8\nnode2 slots=4\n", "# two\n\n  node1   slots=2   \nnode2 slots=1\n"):
        found, problems = parse_hostfile(text, "hosts")
        assert problems == []
        assert found == dict(_parse_hostfile(text.splitlines()))


def test_every_problem_of_a_hostfile_is_told() -> None:
    text = "node1\nnode1 slots=2\nnode1 slots=2\n-oProxyCommand=x slots=1\nnode3;reboot slots=1\nnode4 slots=0\n"
    problems = parse_hostfile(text, "hosts")[1]
    assert [re.findall(r"line (\d)", problem)[0] for problem in problems] == ["1", "3", "4", "5", "6"]
    assert "Write it as `node1 slots=8`" in problems[0]
    assert parse_hostfile("# nobody\n", "hosts")[1][0].startswith("hosts names no host. Write one a line")


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (None, None), ("node2", None), ("node1:1@node2", None), ("node2@node1:0,2", None), (None, "node1"),
        (None, "node1:0@node2:3"), (None, "node2:0,1"),
    ],
)  # fmt: skip
def test_filters_choose_what_deepspeeds_choose(include: str | None, exclude: str | None) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    pool = {"node1": 3, "node2": 4}
    expected = parse_inclusion_exclusion(pool, include or "", exclude or "")
    found, problems = choose(pool, include, exclude, "auto")
    assert problems == []
    assert {host.name: list(host.slots) for host in found} == expected
    assert parse_inclusion_exclusion(pool, include_of(found), "") == expected
    listed = parse_hostfile(rendered(found), "again")[0]
    assert parse_inclusion_exclusion(listed, include_of(found), "") == expected


@pytest.mark.parametrize(
    ("include", "exclude", "ranks", "said"),
    [
        ("nod1", None, "auto", "launch.include=nod1: 'nod1' is not in the hostfile. Did you mean node1?"),
        ("node1:9", None, "auto", "launch.include=node1:9: node1 has no slot 9, its slots are 0 to 1."),
        ("node1:a", None, "auto", "launch.include=node1:a: 'a' is no list of slots. Write node1:0,2."),
        (None, "node1@node2", "auto", "launch.exclude=node1@node2 leaves no slot of the hostfile."),
        ("node1", "node2", "auto", "launch.include and launch.exclude are two ways to say the same."),
        (None, None, 9, "launch.ranks=9 is more than the 4 slots of node1, node2."),
    ],
)
def test_a_wrong_choice_is_told(include: str | None, exclude: str | None, ranks: int | str, said: str) -> None:
    found, problems = choose({"node1": 2, "node2": 2}, include, exclude, ranks)
    assert found == []
    assert problems[0].startswith(said)


def test_ranks_fill_host_after_host() -> None:
    assert ranks_of(HOSTS) == {"node1": range(2), "node2": range(2, 3)}
    assert limited(HOSTS, 2) == [HOSTS[0]]
    assert at(HOSTS, {"node2": 1}) == [HOSTS[1]]
    assert at(HOSTS, {"node1": 1, "node2": 0}) == [Host("node1", (0,))]


def test_each_rank_is_told_its_place() -> None:
    found = commands("direct", HOSTS, "10.0.0.1", 4242, Path("/runs/first"), None)
    last = found["node2"][0][1].environment
    assert [number for its in found.values() for number, _ in its] == [0, 1, 2]
    assert {name: last[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1",
    }  # fmt: skip
    assert last["CUDA_VISIBLE_DEVICES"] == "1", "the slot of the hostfile"
    [(number, second)] = commands("torchrun", HOSTS, "10.0.0.1", 4242, Path("/runs/first"), "/runs/old")["node2"]
    assert number == 2
    assert {"--node-rank=1", "--nnodes=2", "--nproc-per-node=1", "--resume=/runs/old"} <= set(second.argv)


def test_variables_of_a_run_reach_its_hosts_and_secrets_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose(["launch=ssh", "launch.hostfile=x", "launch.variables=[MINE]", "launch.ssh_port=2222"]).run
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("WANDB_API_KEY", "key-of-wandb")
    monkeypatch.setenv("HF_TOKEN", "token-of-hub")
    monkeypatch.setenv("MINE", "of-my-own")
    found = variables_of(HOSTS[1], {"cores": 12}, "eth7", run)
    assert "CUDA_VISIBLE_DEVICES" not in found, "slots name the devices, not what is visible here"
    assert (found["WANDB_API_KEY"], found["HF_TOKEN"], found["MINE"]) == ("key-of-wandb", "token-of-hub", "of-my-own")
    assert found["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "HOME" not in forwarded([])
    text = shown(run, Path("/runs/first"), HOSTS, None)
    for engine in ("direct", "torchrun"):
        text += repr(commands(engine, HOSTS, "a", 1, Path("/runs/first"), None))
    text += str(deepspeed_command(HOSTS, "a", 1, run, Path("/runs/first"), None, "token"))
    assert not re.search("key-of-wandb|token-of-hub|of-my-own", text)
    assert "WANDB_API_KEY" in text, "but a dry run tells that it is given"


def test_what_ssh_hands_to_a_shell_is_quoted() -> None:
    words = ["env", "A=$(reboot)", "x; y", "it's"]
    command = ssh_command("node1", 2222, words)
    assert shlex.split(command[-1]) == words
    assert command[-3:-1] == ["--", "node1"]
    assert "2222" in command
    assert problems_for_pdsh(Path("/runs/$x"), "/usr/bin/pdsh")[0].startswith("run.dir=/runs/$x holds characters")
    assert "needs pdsh" in problems_for_pdsh(Path("/runs/x"), None)[0]


OWN: dict[str, Any] = {
    "machine": "here", "python": "3.11.2", "versions": {"torch": "2.13.0"}, "code": "a", "sees": True, "config": "c",
    "cwd": True, "gpus": 2, "cores": 8, "rooms": {"/tmp": 10**10}, "skew": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "2.12.0"}}, "node2: torch is 2.12.0 there and 2.13.0 here."),
        ({"python": "3.12.1"}, "node2: python is 3.12.1 there and 3.11.2 here."),
        ({"code": "b"}, "node2: its distft has other sources than the one here."),
        ({"sees": False}, "node2: run.dir=/runs/x is not seen there as it is here."),
        ({"config": "d"}, "node2: /runs/x/config.yaml differs"),
        ({"cwd": False}, "node2: there is no folder /work"),
        ({"skew": -95.0}, "node2: its clock is 95 s behind the one here"),
        ({"gpus": 1}, "node2: slot 1 is used (they count from 0), but it has 1 GPU. Lower its slots."),
        ({"gpus": 0}, "node2: no GPU is seen there, but on node1."),
        ({"rooms": {"/tmp": 5_000_000}}, "node2: /tmp has 5 MB free, 67 MB are needed."),
        ({"machine": "one"}, "node1 and node2 are one machine."),
    ],
)
def test_what_makes_a_host_unfit_is_told(change: dict[str, Any], said: str) -> None:
    told = {"node1": OWN | {"machine": "one"}, "node2": OWN | {"machine": "two"}}
    assert judge(HOSTS, told, OWN, "/runs/x", "/work") == []
    told["node2"] |= change
    [problem] = judge(HOSTS, told, OWN, "/runs/x", "/work")
    assert problem.startswith(said)


def test_a_lost_host_is_the_first_cause() -> None:
    """Its peers fail within milliseconds, ssh notices after seconds, and by then the rest was ended by us."""
    lost = End(1, 255, 30.0, "node2", lost="Timeout, server node2 not responding")
    assert first_cause([End(0, 1, 10.0, "node1"), lost]) is lost
    assert str(lost).startswith("host node2 was lost in the middle of the run (Timeout, server node2 not responding)")


def test_ssh_wants_a_hostfile_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "launch=ssh needs launch.hostfile" in check(compose(["launch=ssh"]).run)[0]
    assert "launch.hostfile=x has no effect with launch=local" in check(compose(["launch.hostfile=x"]).run)[0]
    wrong = compose(["launch=ssh", "launch.hostfile=x", "launch.variables=['A=b']", "launch.port=0"]).run
    assert [problem.partition(":")[0] for problem in check(wrong)] == ["launch.port=0", "launch.variables"]
    with pytest.raises(Mistakes, match="cannot be read: No such file"):
        hosts_of(compose(["launch=ssh", f"launch.hostfile={tmp_path / 'none'}"]).run)
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    named = compose(["launch=ssh", f"launch.hostfile={tmp_path / 'hosts'}", "launch.variables=[NOT_SET_ANYWHERE]"]).run
    with pytest.raises(Mistakes, match="NOT_SET_ANYWHERE is not set here"):
        hosts_of(named)


def test_variables_laid_down_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.launch.worker.memory_folder", lambda: tmp_path)
    monkeypatch.setenv("LAID_DOWN", "before")
    (tmp_path / "distft-abc").mkdir()
    (tmp_path / "distft-abc" / "environment.json").write_text('{"LAID_DOWN": "after"}')
    assert take_environment(["train", "--environment=abc", "--prepared"]) == ["train", "--prepared"]
    assert os.environ["LAID_DOWN"] == "after"


def test_the_files_to_copy_are_what_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """launch/ssh.sh, word for word, but for the words that stand for the snapshot."""
    monkeypatch.delenv("DISTFT_SSH_OPTIONS", raising=False)
    script = (ROOT / "launch" / "ssh.sh").read_text()
    said = " ".join(line.strip("# ") for line in script.splitlines()[2:4])
    words = [word for word in said.split()[2:] if not word.startswith("launch.hostfile=")]
    run = compose([*words, f"launch.hostfile={ROOT / 'launch' / 'hostfile.example'}"]).run
    assert check(run) == []
    run_dir = Path(run.run.dir or "")
    printed = shown(run, run_dir, hosts_of(run), None)
    rank = f"-m distft train --snapshot={run_dir}/config.yaml --prepared"
    started = []
    for line in printed.splitlines():
        if line.startswith("ssh "):
            line = line.removesuffix(" &").replace(rank, "train.py strategy=zero3 run.dir=$run")
            line = line.replace(sys.executable, "python").replace(os.getcwd(), "$PWD")
            started.append([re.sub(r"PYTHONPATH=\S+ ", "", word) for word in shlex.split(line)])
    joined = script.replace("\\\n  ", "")
    written = [shlex.split(line.removesuffix(" &")) for line in joined.splitlines() if line.startswith("ssh ")]
    assert written == started
    assert len(written) == 2
    assert subprocess.run(["bash", "-n"], input=printed + script, text=True).returncode == 0
