"""Heartbeats and what is made of them: which rank is named, when nobody is, what is said."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distft import heartbeat
from distft.config.schema import Run
from distft.heartbeat import PHASES, Beat, Heartbeat, memory_file, read_file
from distft.launch.blame import Patience, sentence
from distft.launch.folder import make_folder
from distft.launch.stall import OwnWatch, Sights, held, publish, save_stacks, sweep_out
from distft.pulse import FOLDER, Pulse, forget, publication, published, read_publication, stacks_file, standing_at

NOW = time.mktime((2026, 11, 21, 15, 30, 10, 0, 0, -1))
PATIENCE = Patience(step=5, start=60)


def beat(rank: int, phase: str = "backward", **given: Any) -> Beat:
    known: dict[str, Any] = {
        "rank": rank, "size": 2, "pid": 100 + rank, "host": "node3", "machine": "m", "number": 50, "step": 7,
        "phase": phase, "steps": 7, "collectives": (40, 6), "age": 6.0, "state": "sleeping",
    }  # fmt: skip
    return Beat(**known | given)


def say(*beats: Beat, patience: Patience = PATIENCE, missing: tuple[int, ...] = ()) -> str | None:
    return sentence(beats, patience, NOW, missing)


BEHIND: dict[str, Any] = {"number": 48, "collectives": (39, 6)}
WAITS = "; rank 0 waits for it in collective number 46, phase backward of step 7"


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        pytest.param(
            {"state": "stopped", "phase": "forward", **BEHIND},
            "Rank 1 (process 101) on node3 is stopped (SIGSTOP) in phase forward of step 7 since 15:30:04 (6 s)",
            id="stopped",
        ),
        pytest.param(
            {"state": "tracing-stop"},
            "Rank 1 (process 101) on node3 is stopped (a debugger) in phase backward of step 7 since 15:30:04 (6 s)",
            id="stopped inside the same collective",
        ),
        pytest.param(
            {"state": "stopped", "collectives": (42, 6), "number": 50},
            "Rank 1 (process 101) on node3 is stopped (SIGSTOP) in phase backward",
            id="stopped one collective ahead",
        ),
        pytest.param(
            {"phase": "data", "where": "step, a.py:3", **BEHIND},
            "Rank 1 (process 101) on node3 waits for its own data of step 7 since 15:30:04 (6 s) (at step, a.py:3)",
            id="loader",
        ),
        pytest.param(
            {"phase": "data", "state": "disk-sleep", **BEHIND},
            "waits for its own data of step 7 since 15:30:04 (6 s), and its process waits for a disk or a network file",
            id="disk",
        ),
        pytest.param(
            {"phase": "record", "where": "sleep, b.py:9", **BEHIND},
            "Rank 1 (process 101) on node3 has not joined collective number 46, in phase record of step 7 since "
            "15:30:04 (6 s) (at sleep, b.py:9)",
            id="not joined",
        ),
        pytest.param(
            {"phase": "data", "number": 55, "answers": False, "collectives": (39, 6)},
            "Rank 1 (process 101) on node3 gives no sign of life since 15:30:04 (6 s), last seen in phase data of "
            "step 7: the interpreter is held",
            id="interpreter held",
        ),
        pytest.param(
            {"answers": False, "state": "", **BEHIND},
            "gives no sign of life since 15:30:04 (6 s), last seen in phase backward of step 7: stopped, or the host",
            id="another host, gone",
        ),
        pytest.param(
            {"phase": "forward", "step": 8, "number": 58, "collectives": (39, 7)},
            "Rank 1 (process 101) on node3 has left out collective number 46, in phase forward of step 8",
            id="went on without a collective",
        ),
        pytest.param(
            {"answers": False, "state": "stopped", "phase": "start", "step": 0, "steps": 0, **BEHIND},
            "Rank 1 (process 101) on node3 is stopped (SIGSTOP) in phase start since 15:30:04 (6 s)",
            id="stopped, last seen at the start",
        ),
        pytest.param({"state": "gone", **BEHIND}, "Rank 1 (process 101) on node3 has ended in phase", id="gone"),
        pytest.param(
            {"phase": "end", "collectives": (30, 6), "number": 40},
            "Rank 1 (process 101) on node3 has ended in phase end of step 7",
            id="ended too early",
        ),
    ],
)
def test_the_rank_that_is_behind_is_named(behind: dict[str, Any], said: str) -> None:
    for order in (1, -1):
        found = say(*[beat(0), beat(1, **behind)][::order])
        assert found is not None
        assert said in found
        assert WAITS in found
        assert "Rank 0" not in found
        assert found.endswith(".")
        assert "\n" not in found
    mirrored = say(beat(0, **behind), beat(1))
    assert mirrored is not None
    assert mirrored.startswith("Rank 0 (process 100)")
    assert "; rank 1 waits for it" in mirrored


@pytest.mark.parametrize(
    "beats",
    [
        pytest.param([beat(0, age=4.9), beat(1, age=4.9)], id="all move"),
        pytest.param([beat(0, age=50), beat(1, "evaluation", age=1, **BEHIND)], id="one evaluates, the other waits"),
        pytest.param([beat(0, age=50), beat(1, "checkpoint", age=3, **BEHIND)], id="one writes a checkpoint"),
        pytest.param([beat(0, "final", age=2, **BEHIND), beat(1, "final", age=2000)], id="rank 0 writes the model"),
        pytest.param([beat(0, "start", steps=0, age=50), beat(1, "start", steps=0, age=50)], id="both start"),
        pytest.param([beat(0, steps=1, age=50), beat(1, steps=1, age=59)], id="the first step compiles"),
        pytest.param(
            [beat(0, "closing", age=50), beat(1, "end", age=5000)], id="the tracker sends, the other has left"
        ),
        pytest.param([beat(0, "end", age=5000), beat(1, "end", age=5000)], id="both have ended"),
        pytest.param([beat(0, age=2), beat(1, state="stopped", age=4, **BEHIND)], id="stopped, but not long yet"),
        pytest.param([beat(0, age=1), beat(1, answers=False, state="", age=40, **BEHIND)], id="its news are held up"),
    ],
)
def test_nobody_is_named_while_the_run_moves(beats: list[Beat]) -> None:
    assert say(*beats) is None
    assert say(*beats[::-1]) is None


def test_a_start_has_its_own_limit() -> None:
    stuck = [beat(0, "start", steps=0, step=0, age=70), beat(1, "start", steps=0, step=0, age=70, **BEHIND)]
    found = say(*stuck)
    assert found is not None
    assert found.startswith("Rank 1 (process 101) on node3 has not joined collective number 46, in phase start since")
    assert say(*stuck, patience=Patience(step=5, start=80)) is None
    assert say(*stuck, patience=Patience(step=80, start=5)) is None, "the longer of both holds"


def test_all_ranks_in_one_place_blame_what_connects_them() -> None:
    found = say(beat(0), beat(1, host="node4"))
    assert found is not None
    assert found.startswith("Ranks 0, 1 on node3, node4 all stand after collective number 46, in phase backward of")
    assert "what connects them" in found
    data = say(beat(0, "data"), beat(1, "data"))
    assert data is not None
    assert data.startswith("Ranks 0, 1 on node3 wait for their own data of step 7 since")


def test_one_rank_alone() -> None:
    found = say(beat(0, "forward", where="f, c.py:1"))
    assert (
        found
        == "Rank 0 (process 100) on node3 has not moved in phase forward of step 7 since 15:30:04 (6 s) (at f, c.py:1)."
    )


def test_several_ranks_behind() -> None:
    beats = [beat(rank, size=20, **(BEHIND if rank in (3, 4) else {})) for rank in range(20)]
    found = say(*beats)
    assert found is not None
    assert found.startswith("Ranks 3, 4 on node3 have not joined collective number 46")
    assert "the other 18 ranks wait for it in collective number 46" in found
    beats[4] = dataclasses.replace(beats[4], age=1)
    assert say(*beats) is None, "one of those behind still moves: it may be what the other waits for"


def test_a_rank_that_never_came() -> None:
    found = say(beat(0, "start", steps=0, step=0, age=70), missing=(1,))
    assert found == "Nothing was ever seen of rank 1; rank 0 waits for it in collective number 46, phase start."
    assert say(beat(0, "start", steps=0, age=50), missing=(1,)) is None


def test_another_hosts_clock_is_not_used() -> None:
    """What it publishes keeps its age while it comes anew, and ages by the reader's clock when it does not."""
    text = published(beat(1, age=2.5))
    skewed = json.dumps(json.loads(text) | {"time": time.time() - 5000})
    fresh, late = read_publication(skewed, silent=4), read_publication(skewed, silent=11)
    assert fresh is not None
    assert (fresh.age, fresh.answers) == (2.5, True)
    assert late is not None
    assert (late.age, late.answers) == (13.5, False)
    assert dataclasses.replace(fresh, state="sleeping") == beat(1, age=2.5)
    for broken in ("", "{", "[]", "{}", text.replace("collectives", "c")):
        assert read_publication(broken, 0) is None


def test_memory_tells_what_was_marked(tmp_path: Path) -> None:
    own = Heartbeat(memory_file(tmp_path, 3), 3, 8)
    assert read_file(memory_file(tmp_path, 3)) is None, "nothing was marked yet"
    assert read_file(memory_file(tmp_path, 4)) is None
    for step in (6, 7):
        own.mark("data", step)
    for phase in PHASES:
        own.mark(phase)
        own.tick([11, 5], str)
        seen = read_file(memory_file(tmp_path, 3))
        assert seen is not None
        assert (seen.rank, seen.size, seen.pid, seen.phase, seen.step) == (3, 8, os.getpid(), phase, 7)
        assert seen.collectives == (11, 5)
        assert seen.answers
        assert 0 <= seen.age < 1
    assert seen.number == 2 + len(PHASES)
    assert seen.steps == 3
    own.tick([], str)  # the groups are gone, their numbers stay
    assert (read_file(memory_file(tmp_path, 3)) or seen).collectives == (11, 5)


def test_what_keeps_a_rank_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    own = Heartbeat(None, 0, 1)

    def age_after(seconds: float, do: Any = lambda: None) -> tuple[float, bool]:
        clock[0] += seconds
        do()
        seen = own.look()
        assert seen is not None
        return seen.age, seen.answers

    own.mark("evaluation", 1)
    assert age_after(2) == (2, True)
    assert age_after(2) == (4, False), "no tick of the second thread"
    assert age_after(1, own.beat) == (0, False)
    assert age_after(2, lambda: own.tick([1], str)) == (0, True), "a collective was started"
    assert age_after(2, lambda: own.tick([1], lambda: "f, x.py:3")) == (2, True)
    seen = own.look()
    assert seen is not None
    assert seen.where == "f, x.py:3"
    beside = threading.Thread(target=own.beat)

    def another_thread() -> None:
        beside.start()
        beside.join()

    assert age_after(1, another_thread)[0] == 3, "what a thread beside training does is no step of training"
    own.mark("checkpoint")
    clock[0] += 5
    assert age_after(0)[0] == 5
    beside = threading.Thread(target=own.beat)
    assert age_after(0, another_thread)[0] == 0, "except where training waits for it"


def test_where_training_stands() -> None:
    frame = standing_at("forward")
    assert frame.startswith("standing_at, ")
    assert "distft/pulse.py" in frame
    ready, leave = threading.Event(), threading.Event()

    def load() -> None:
        ready.set()
        leave.wait()

    loader = threading.Thread(target=load, name="prefetch")
    loader.start()
    ready.wait()
    time.sleep(0.05)
    assert standing_at("data").startswith("wait, ")
    leave.set()
    loader.join()


RANK = """
import os, sys, time
from pathlib import Path
from distft import heartbeat
from distft.pulse import Pulse
with Pulse(Path(sys.argv[1]), 0, 1):
    heartbeat.mark("data", 4)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_process_shows_its_place_and_its_stacks(tmp_path: Path) -> None:
    run_dir, memory = tmp_path / "run", tmp_path / "memory"
    memory.mkdir()
    environment = {**os.environ, FOLDER: str(memory), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(run_dir)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    [seen] = Sights(run_dir, 1, memory).of_this_host()
    assert (seen.phase, seen.step, seen.pid) == ("data", 4, process.pid)
    assert seen.state in ("sleeping", "running")
    deadline = time.monotonic() + 20
    while not publication(run_dir, 0).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    [told] = Sights(run_dir, 1, None).of_others([])
    assert (told.phase, told.step, told.pid, told.machine) == ("data", 4, process.pid, seen.machine)
    save_stacks(run_dir, [seen])
    stacks = stacks_file(run_dir, 0).read_text()
    assert '<string>", line 9 in <module>' in stacks
    assert "distft/pulse.py" in stacks, "of all threads"
    process.communicate("\n", timeout=20)
    assert process.returncode == 0, "the signal for stacks ends nobody"
    assert json.loads(publication(run_dir, 0).read_text())["phase"] == "end"
    forget(run_dir)
    assert not publication(run_dir, 0).parent.exists()


def test_what_was_said_of_an_earlier_start_ends_no_later_one(tmp_path: Path) -> None:
    make_folder(Run(), ["train.py"], tmp_path)
    (tmp_path / "logs" / "heartbeat").mkdir()
    publish(tmp_path, "Rank 1 stands still.")
    watch = OwnWatch(tmp_path, 0, 2, PATIENCE)
    assert watch.knows()
    make_folder(Run(), ["train.py"], tmp_path)
    assert not watch.knows()


def test_without_a_heartbeat_marks_do_nothing(tmp_path: Path) -> None:
    heartbeat.mark("forward", 3)
    heartbeat.beat()
    with Pulse(tmp_path, 0, 1) as pulse:
        heartbeat.mark("forward", 3)
        assert pulse.heartbeat.step == 3
    heartbeat.mark("backward", 4)
    assert pulse.heartbeat.step == 3
    assert not stacks_file(tmp_path, 0).exists(), "no empty file is left behind"


def test_what_killed_controllers_left_in_memory_goes(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    mine = tmp_path / "distft-beats-of-mine"
    for name in ("distft-beats-left", "distft-beats-used", "distft-beats-young", mine.name, "distft-run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0.beat").write_bytes(bytes(8))
        if name == mine.name:
            (mine / "model.safetensors").write_bytes(bytes(8))
        if name != "distft-beats-young":
            os.utime(tmp_path / name, (long_ago, long_ago))
    holding = (
        "import sys, time; from pathlib import Path; from distft.launch.stall import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path / "distft-beats-used")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        sweep_out(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            mine.name,
            "distft-beats-used",
            "distft-beats-young",
            "distft-run",
        ]
    finally:
        holder.kill()
        holder.wait()
    with held(tmp_path / "distft-beats-young"):
        sweep_out(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "distft-beats-young", "distft-run"]
    assert (mine / "model.safetensors").exists()
