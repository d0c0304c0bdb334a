"""The starter on a host, as a process of this machine: what ssh would carry goes through pipes."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distft.launch import agree
from distft.launch.facts import hash_of_code, memory_folder
from distft.launch.node import MARK


class Node:
    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distft.launch.node"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.early: list[dict[str, Any]] = []  # what processes printed before the answer
        assert self.hear() == {"answer": {}}

    def tell(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        if self.early:
            return self.early.pop(0)
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline().removeprefix(MARK)))

    def start(self, run_dir: Path, *commands: list[Any], **variables: str) -> None:
        (run_dir / "logs").mkdir(exist_ok=True)
        self.tell(
            do="start", token=self.token, run_dir=str(run_dir), cwd=str(run_dir), variables=variables,
            commands=list(commands), ranks=[],
        )  # fmt: skip
        before = []
        while "answer" not in (word := self.hear()):
            before.append(word)
        assert word == {"answer": {}}
        self.early = before


@pytest.fixture
def node() -> Iterator[Node]:
    found = Node()
    yield found
    found.process.kill()
    found.process.wait()
    assert found.process.stdout is not None
    found.process.stdout.close()
    shutil.rmtree(memory_folder() / f"distft-{found.token}", ignore_errors=True)


def test_it_tells_and_starts_and_reports(node: Node, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "token").write_text("token")
    node.tell(do="look_around", run_dir=str(tmp_path), token="token", cwd=str(tmp_path))
    told = node.hear()["answer"]
    assert (told["sees"], told["cwd"], told["code"]) == (True, True, hash_of_code())
    node.tell(do="missing", paths=[str(tmp_path), str(tmp_path / "none")])
    assert node.hear()["answer"] == {"missing": [str(tmp_path / "none")]}
    speaks = ["sh", "-c", "echo $GIVEN $RANK; exit 3"]
    node.start(tmp_path, [0, speaks, {"RANK": "0"}, True], [1, speaks, {"RANK": "1"}, False], GIVEN="a secret")
    heard = [node.hear() for _ in range(3)]
    assert {"output": 1, "text": "a secret 0\n"} in heard
    assert {(word["left"], word["code"]) for word in heard if "left" in word} == {(0, 3), (1, 3)}
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "a secret 1\n"
    node.tell(do="leave")
    assert node.process.wait(10) == 0
    assert not (memory_folder() / f"distft-{node.token}").exists()


def test_who_started_it_is_gone(node: Node, tmp_path: Path) -> None:
    """Its processes are asked to end, and nothing is left."""
    saves = ["sh", "-c", "trap 'echo saved; exit 0' TERM; echo here; while :; do sleep 0.1; done"]
    node.start(tmp_path, [0, saves, {}, True], [1, saves, {}, False])
    assert node.hear() == {"output": 1, "text": "here\n"}
    children = psutil.Process(node.process.pid).children()
    while (tmp_path / "logs" / "rank-1.log").read_text() != "here\n":
        time.sleep(0.02)
    assert len(children) == 2
    assert node.process.stdin is not None
    node.process.stdin.close()
    node.process.wait(20)
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "here\nsaved\n"
    assert not any(child.is_running() for child in children)
    assert not (memory_folder() / f"distft-{node.token}").exists()


def test_variables_for_ranks_of_another_launcher_are_for_this_user_alone(node: Node) -> None:
    node.tell(do="attend", token=node.token, variables={"KEY": "a secret"}, ranks=[0])
    assert node.hear() == {"answer": {}}
    folder = memory_folder() / f"distft-{node.token}"
    file = folder / "environment.json"
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    told = json.loads(file.read_text())
    assert told["KEY"] == "a secret"
    rank = subprocess.Popen(["sleep", "60"])
    (folder / "rank-0.pid").write_text(str(rank.pid))
    while file.exists():  # all ranks have read it
        time.sleep(0.02)
    node.tell(do="kill")
    assert rank.wait(10) == -9
    found = node.hear()
    assert (found["ended"], found["code"]) == (0, -6)
    node.tell(do="leave")
    assert node.process.wait(10) == 0


def test_a_rank_with_a_problem_does_not_wait_for_torch_to_find_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert agree.is_served(0.5)
    assert not agree.is_served(0.5)
