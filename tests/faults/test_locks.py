"""Two launches never share a run folder, and one that was killed does not block the next."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft import errors
from distft.errors import UserMistake
from distft.launch import lock
from distft.launch.lock import Holder
from tests.faults.runs import ROOT, Shop, records

TRIAL = "two launches on one folder; the port taken; 1,000 evaluations and saves in a row"
HOLD = """
import sys, time
from pathlib import Path
from distft.errors import UserMistake
from distft.launch import lock
try:
    lock.take(Path(sys.argv[1]))
except UserMistake as mistake:
    print("refused", mistake, flush=True)
else:
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    lock.release()
    yield
    lock.release()


def holding(folder: Path, seconds: float = 100, **environment: str) -> subprocess.Popen[str]:
    """Another launch, in a process of its own."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    clean = {name: value for name, value in os.environ.items() if name != lock.LAUNCH}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**clean, **environment})


def answer(process: subprocess.Popen[str]) -> str:
    """What `holding` said, without what it told before."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("held", "refused")):
            return line
    raise AssertionError("it said nothing")


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def write(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    path = folder / lock.LOCK
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.trial(TRIAL)
def test_of_many_at_once_one_holds_and_the_others_are_told_who(tmp_path: Path) -> None:
    dead = dataclasses.replace(Holder.here(), pid=2**22 + 1, start="1")
    write(tmp_path, dead)  # so that they race to take it over, too
    launches = [holding(tmp_path) for _ in range(8)]
    try:
        answers = [answer(launch) for launch in launches]
        assert sorted(text.split()[0] for text in answers) == ["held", *["refused"] * 7]
        winner = next(launch for launch, text in zip(launches, answers, strict=True) if text.startswith("held"))
        for text in answers:
            if text.startswith("refused"):
                assert f"in use by process {winner.pid} on " in text
                assert "since 20" in text
                assert f"kill {winner.pid}" in text
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]
    finally:
        end(*launches)
    said: list[str] = []
    lock.take(tmp_path, said.append)  # kill -9 of the holder does not block the next
    assert f"process {winner.pid} on" in said[0]
    assert "is gone: taken over" in said[0]
    lock.release()
    assert not list(tmp_path.iterdir())


def test_ranks_of_a_dead_launch_are_waited_for_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = holding(tmp_path)
    assert answer(holder).startswith("held")
    found = lock.read(tmp_path / lock.LOCK)
    assert found is not None
    rank = holding(tmp_path, **{lock.LAUNCH: f"{found.token}:{tmp_path}"})
    try:
        assert answer(rank).startswith("held"), "a rank joins its own launch"
        end(holder)
        monkeypatch.setattr(lock, "LEAVE_SECONDS", 0.3)
        with pytest.raises(UserMistake, match=rf"ranks \(process {rank.pid}\) of process {holder.pid}"):
            lock.take(tmp_path)
        monkeypatch.setattr(lock, "LEAVE_SECONDS", 60.0)
        threading.Timer(0.5, rank.kill).start()
        said: list[str] = []
        lock.take(tmp_path, said.append)
        assert "waiting for its ranks to end" in said[0]
        assert "taken over" in said[1]
    finally:
        end(rank)


def test_another_machine_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = dataclasses.replace(Holder.here(), machine="another boot", host="node7")
    monkeypatch.setattr(lock, "OLD_SECONDS", 2.0)
    path = write(tmp_path, elsewhere, age=1.5)
    threading.Timer(0.2, os.utime, [path]).start()
    with pytest.raises(UserMistake, match="on node7"):
        lock.take(tmp_path)
    said: list[str] = []
    started = time.monotonic()
    lock.take(tmp_path, said.append)  # nothing renews it any more
    assert 1 < time.monotonic() - started < 10
    assert "waiting for a sign of life" in said[0]
    assert "no sign of life for 2 s: taken over" in said[1]


@pytest.mark.parametrize("content", ["", "{}", "null", "\udc80"])
def test_a_lock_that_cannot_be_read_is_old_some_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / lock.LOCK
    path.write_text(content, errors="surrogateescape")
    os.utime(path, (time.time() - 70,) * 2)
    lock.take(tmp_path)
    assert lock.read(path) is not None


def test_a_process_id_given_away_again_is_not_the_holder(tmp_path: Path) -> None:
    here = Holder.here()
    assert here.is_here
    assert dataclasses.replace(here, start="1").is_gone
    assert not dataclasses.replace(here, machine="another boot").is_gone
    write(tmp_path, dataclasses.replace(here, start="1"))
    lock.take(tmp_path)


def test_a_holder_renews_its_lock_and_notices_that_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    lock.take(tmp_path)
    path = tmp_path / lock.LOCK
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 20
    while path.stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.check_held(tmp_path)
    path.unlink()
    lock.check_held(tmp_path)  # deleted by hand: nobody else has it
    write(tmp_path, dataclasses.replace(Holder.here(), host="node7"))
    with pytest.raises(UserMistake, match=r"taken over by process .* on node7"):
        lock.check_held(tmp_path)
    with pytest.raises(UserMistake, match="taken over"):
        lock.take(tmp_path)
    lock.release()
    assert path.exists(), "another's lock is left alone"


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize(
    ("num_ranks", "engine"),
    [(1, "direct"), *(pytest.param(2, engine, marks=pytest.mark.thorough)
                      for engine in ("direct", "deepspeed", "torchrun"))],
)  # fmt: skip
def test_two_launches_on_one_folder(tmp_path: Path, num_ranks: int, engine: str) -> None:
    shop = Shop.open(tmp_path)
    words = ["strategy=ddp", "max_steps=100000", "checkpoint.every=5", f"launch.ranks={num_ranks}",
             f"launch.engine={engine}"]  # fmt: skip
    with shop.start("one", *words) as first:
        first.wait_for((first.folder / "checkpoints" / "latest").exists)
        before = sorted(path.name for path in first.folder.glob("config*"))
        code, text = shop.run("one", *words)
        assert code == errors.USER_MISTAKE, text
        assert f"in use by process {first.process.pid} on " in text
        assert "Traceback" not in text
        assert sorted(path.name for path in first.folder.glob("config*")) == before, "it wrote nothing there"
        assert first.process.poll() is None, "the first is not harmed"
        first.process.kill()
        first.process.wait()
    last = max(record["step"] for record in records(shop.folder / "one"))
    code, text = shop.run("one", *words, f"max_steps={last + 40}")
    assert code == errors.DONE, text
    assert f"was held by process {first.process.pid} on " in text
    assert "taken over" in text
    assert "Going on after step" in text
    assert "max_steps was 100000, is" in text
    assert not (shop.folder / "one" / lock.LOCK).exists()
