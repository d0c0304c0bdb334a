"""What follows a crash: whether the ranks are started again, how many of them, where and when."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distft.config.check import check
from distft.config.load import compose
from distft.errors import SAVED_AFTER_SIGNAL, STALLED
from distft.launch.agree import PortTaken, connect
from distft.launch.failure import End, Failure
from distft.launch.restart import (
    Again,
    Crash,
    GiveUp,
    Places,
    decide,
    keep_running,
    newest_checkpoint,
    on_a_free_port,
    wait,
    wrote_checkpoints,
)
from distft.launch.stop import Signals
from distft.launch.topology import Place
from distft.launch.watch import Ending


def crashes(*steps: int, size: int = 4, seconds: float = 10.0) -> list[Crash]:
    return [Crash({"a": size}, step, seconds, "a") for step in steps]


ALL = {"a": 4}


def test_a_crash_is_followed_by_a_start_with_all_ranks() -> None:
    assert decide(crashes(0), ALL, 3, None, 1.0) == Again({"a": 4}, 1.0)
    assert decide(crashes(0, 10, 20), ALL, 3, None, 1.0) == Again({"a": 4}, 4.0)


def test_restarts_are_counted() -> None:
    found = decide(crashes(0, 10, 20, 30), ALL, 3, None, 1.0)
    assert found == GiveUp("launch.max_restarts=3 is used up")


def test_without_a_new_checkpoint_between_two_crashes_there_is_no_third_start() -> None:
    found = decide(crashes(10, 10), ALL, 3, None, 1.0)
    assert isinstance(found, GiveUp)
    assert "no checkpoint was written between the last two crashes (the newest is of step 10)" in found.reason
    assert isinstance(decide(crashes(10, 11), ALL, 3, None, 1.0), Again), "negative control"


def test_fewer_ranks_go_on_where_that_is_allowed() -> None:
    assert decide(crashes(10, 10), ALL, 3, 2, 1.0) == Again({"a": 3}, 2.0), "stuck with all of them"
    assert decide(crashes(10), {"a": 3}, 3, 2, 1.0) == Again({"a": 3}, 1.0), "a GPU was lost"
    assert decide(crashes(10, 10), {"a": 3}, 3, 2, 1.0) == Again({"a": 3}, 2.0), "and that is why they were stuck"
    found = decide(crashes(10), {"a": 1}, 3, 2, 1.0)
    assert found == GiveUp("1 of 4 ranks can be started again, and launch.min_ranks=2 are needed")
    assert isinstance(decide(crashes(10), {"a": 3}, 3, None, 1.0), GiveUp), "by default all are needed"
    assert isinstance(decide(crashes(10, 10, size=2), {"a": 2}, 3, 2, 1.0), GiveUp)


def test_with_several_nodes_the_one_that_fails_again_is_left_out() -> None:
    nodes = {"a": 8, "b": 8, "c": 8}
    stuck = [Crash(nodes, 10, 10.0, "c"), Crash(nodes, 10, 10.0, "b")]
    assert decide(stuck, nodes, 3, 16, 1.0) == Again({"a": 8, "c": 8}, 2.0)
    assert decide(stuck[:1], {"a": 8, "c": 8}, 3, 16, 1.0) == Again({"a": 8, "c": 8}, 1.0), "a node is gone"
    assert isinstance(decide(stuck, nodes, 3, 20, 1.0), GiveUp)


def test_only_sizes_that_the_strategy_takes() -> None:
    even = lambda size: size % 2 == 0  # noqa: E731
    assert decide(crashes(10, 10), ALL, 3, 1, 1.0, even) == Again({"a": 2}, 2.0)
    assert isinstance(decide(crashes(10, 10, size=2), {"a": 2}, 3, 1, 1.0, even), GiveUp)


def test_waits_double_up_to_a_minute_and_begin_anew_after_a_start_that_lasted() -> None:
    assert [wait(crashes(*range(count)), 1.0) for count in (1, 2, 3, 6, 7, 8)] == [1, 2, 4, 32, 60, 60]
    assert wait([*crashes(1, 2, 3), *crashes(4, seconds=700), *crashes(5)], 1.0) == 2
    assert wait(crashes(1, 2, 3), 0.0) == 0
    assert wait(crashes(1, 2), 90.0) == 90


def checkpoint(run_dir: Path, step: int, complete: bool = True) -> None:
    folder = run_dir / "checkpoints" / (f"step-{step:06d}" if complete else f"step-{step:06d}.tmp-12ab")
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def test_what_counts_as_progress(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == 0
    (tmp_path / "logs").mkdir()
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 8, complete=False)
    assert newest_checkpoint(tmp_path) == 5
    (tmp_path / "config.yaml").touch()
    old = time.time() - 60
    os.utime(tmp_path / "checkpoints" / "step-000005" / "manifest.json", (old, old))
    assert not wrote_checkpoints(tmp_path)
    checkpoint(tmp_path, 10)
    assert wrote_checkpoints(tmp_path)


def test_the_next_start_resumes_what_this_launch_saved(tmp_path: Path) -> None:
    run = compose(["launch.max_restarts=2", "launch.restart_seconds=0", "launch.ranks=2"]).run
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").touch()
    asked: list[str | None] = []

    def attempt(places: Places, resume: str | None) -> Ending:
        asked.append(resume)
        if len(asked) > 1:
            checkpoint(tmp_path, len(asked))
        return Ending(1, End(1, -9, 0.0, "a"), "rank 1 was ended")

    places = {"a": 2}
    assert keep_running(run, tmp_path, places, "elsewhere", attempt, Signals(), None, lambda: places).code == 1
    assert asked == ["elsewhere", "elsewhere", str(tmp_path)]
    over = time.time() - 1
    assert keep_running(run, tmp_path, places, None, attempt, Signals(), over, lambda: places).code == 1
    assert len(asked) == 4, "the deadline is over"


def test_a_signal_between_two_starts_ends_the_wait(tmp_path: Path) -> None:
    run = compose(["launch.max_restarts=2", "launch.restart_seconds=50", "launch.ranks=2"]).run
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").touch()
    signals = Signals()

    def attempt(places: Places, resume: str | None) -> Ending:
        import threading

        threading.Timer(0.3, lambda: signals.note(15, None)).start()
        return Ending(1, End(1, -9, 0.0, "a"), "rank 1 was ended")

    began = time.monotonic()
    places = {"a": 2}
    assert keep_running(run, tmp_path, places, None, attempt, signals, None, lambda: places).code == SAVED_AFTER_SIGNAL
    assert time.monotonic() - began < 5


def test_a_taken_port_is_told_from_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(PortTaken, match="is taken") as caught:
            connect(Place(0, 2, 0, 2), 5)
    failure = Failure.of(caught.value, 0)
    assert not failure.follows
    answers = [Ending(STALLED, End(0, STALLED, 0.0, failure=failure)), Ending(0)]
    assert on_a_free_port(lambda size, resume: answers.pop(0), 2, None, Signals()).code == 0
    other = Ending(STALLED, End(0, STALLED, 0.0))
    answers = [other, Ending(0)]
    assert on_a_free_port(lambda size, resume: answers.pop(0), 2, None, Signals()) == other


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launch.max_restarts=1", "launch.engine=torchrun"], "needs launch.engine=direct"),
        (["launch.min_ranks=1"], "has no effect with launch.max_restarts=0"),
        (["launch.restart_seconds=3"], "has no effect with launch.max_restarts=0"),
        (["launch.max_restarts=1", "launch.ranks=2", "launch.min_ranks=3"], "more than launch.ranks=2"),
        (["launch.max_restarts=-1"], "a whole number from 0"),
        (["launch.deadline=tomorrow"], "is wanted"),
        (["launch.deadline=0"], "is wanted"),
        (["launch.deadline=01:30"], "is wanted"),
        (["launch.requeue=yes"], "launch.requeue"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(words: list[str], told: str) -> None:
    try:
        problems = check(compose(words).run)
    except Exception as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert told in problems[0]


def test_settings_that_can_be_meant() -> None:
    for deadline in ("3600", "00:30:00", "2-00:00:00", "2100-01-31T18:00", "none", "auto"):
        words = ["launch.max_restarts=3", "launch.min_ranks=1", f"launch.deadline={deadline}", "launch.requeue=true"]
        assert check(compose([*words, "launch.ranks=2"]).run) == []
