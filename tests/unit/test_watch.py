"""The controller's watch over its ranks: signals, the end of the others, and who failed first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distft import errors
from distft.errors import Stalled, UserMistake
from distft.launch import failure
from distft.launch.failure import End, Failure
from distft.launch.stop import Requests, Signals
from distft.launch.watch import ending, kill_groups, watch

RANK = """
import ctypes, threading
from distft.launch import stop
stop.SAME_REQUEST_SECONDS = 0.5
flag = stop.StopFlag()
def tell():
    while not any(flag()):
        pass
    print(flag(), flush=True)
threading.Thread(target=tell, daemon=True).start()
print("listens", flush=True)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)  # as in a collective, this thread runs no Python instruction any more
"""


def test_a_rank_that_waits_in_a_collective_hears_signals_too() -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "listens\n"
    rank.send_signal(signal.SIGUSR1)
    assert rank.stdout.readline() == "[False, False, True]\n"
    rank.send_signal(signal.SIGUSR1)
    time.sleep(0.7)
    assert rank.poll() is None, "the same request"
    rank.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert rank.poll() is None, "another signal is a request of its own"
    rank.send_signal(signal.SIGUSR1)
    assert rank.wait(5) == errors.ENDED_AT_ONCE
    assert rank.stderr is not None
    assert "a second SIGUSR1: ended at once" in rank.stderr.read()


def started(*scripts: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", script], process_group=0) for script in scripts]


SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def test_when_one_rank_dies_the_others_are_ended_within_ten_seconds() -> None:
    processes = started("import os; os.kill(os.getpid(), 9)", DEAF)
    began = time.monotonic()
    watched = watch(processes, Signals(), lambda number: None, lambda: kill_groups(processes))
    assert time.monotonic() - began < 10
    assert (watched.codes, watched.ended) == ([-9, -9], {1})


def test_what_a_look_finds_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    processes = started(DEAF, DEAF)
    answers = iter([None, "rank 1 stands still"])
    watched = watch(processes, Signals(), lambda number: None, lambda: kill_groups(processes), lambda: next(answers))
    assert (watched.codes, watched.stalled) == ([-9, -9], "rank 1 stands still")
    assert ending([], Signals(), watched.stalled, Path()).code == errors.STALLED
    assert capsys.readouterr().err == "distft: rank 1 stands still\n"


def test_the_same_signal_within_five_seconds_is_the_same_request() -> None:
    requests = Requests()
    assert [requests.note(15, 100 + after) for after in (0, 0.01, 4.9, 5.1)] == [False, False, False, True]
    assert not requests.note(10, 200), "another signal is a request of its own"


def test_a_signal_is_passed_on_once_and_a_second_one_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.launch.stop.SAME_REQUEST_SECONDS", 1.0)
    processes = started(DEAF, DEAF)
    signals, sent = Signals(), []

    def thrice() -> None:
        for seconds in (0.5, 0.3, 1.5):
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGTERM)

    with signals.caught():
        thread = threading.Thread(target=thrice)
        thread.start()
        codes = watch(processes, signals, sent.append, lambda: kill_groups(processes)).codes
        thread.join()
    assert sent == [signal.SIGTERM]
    assert codes == [-9, -9]


def failed(rank: int, type: str, moment: float, follows: bool, code: int = errors.BUG) -> End:
    record = Failure(rank, "node1", moment, type, "its message\nmore", "loop.py:7 in step", code, follows)
    return End(rank, code, moment + 9, "node1", failure=record)


@pytest.mark.parametrize(
    ("ends", "first", "code"),
    [
        ([End(0, 0, 1), End(1, 0, 1)], None, errors.DONE),
        ([failed(0, "RuntimeError", 1.0, True), End(1, -9, 2.0)], 1, errors.BUG),
        ([failed(0, "RuntimeError", 1.0, True), failed(1, "ValueError", 2.0, False)], 1, errors.BUG),
        ([failed(0, "KeyError", 3.0, False), failed(1, "ValueError", 2.0, False)], 1, errors.BUG),
        ([End(0, -6, 1.0), failed(1, "OutOfMemoryError", 2.0, False)], 1, errors.BUG),
        ([End(0, -6, 1.0), failed(1, "DistBackendError", 0.5, True)], 0, errors.BUG),
        ([failed(0, "Stalled", 1.0, True, errors.STALLED), End(1, -9, 2.0, by_us=True)], 0, errors.STALLED),
        ([failed(0, "GuardStop", 1.0, False, errors.STOPPED_BY_GUARD)], 0, errors.STOPPED_BY_GUARD),
        ([End(0, 143, 2.0), End(1, 143, 1.0)], 1, errors.SAVED_AFTER_SIGNAL),
        ([End(0, -15, 2.0), failed(1, "DistNetworkError", 1.0, True)], 0, errors.SAVED_AFTER_SIGNAL),
        ([End(0, 143, 1.0), End(1, errors.ENDED_AT_ONCE, 1.5), End(2, -11, 2.0)], 2, errors.BUG),
    ],
)  # fmt: skip
def test_the_first_cause_is_named_and_makes_the_exit_code(
    ends: list[End], first: int | None, code: int, tmp_path: Path
) -> None:
    found = ending(ends, Signals(), None, tmp_path)
    assert (found.cause.rank if found.cause else None, found.code) == (first, code)


def test_what_rank_0_has_not_said_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_text("its last words\n")
    ending([failed(0, "RuntimeError", 1, True), failed(1, "ValueError", 2, False)], Signals(), None, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("distft: rank 1 on node1 failed with ValueError: its message (loop.py:7 in step).")
    assert "its last words" in said
    ending([failed(0, "RuntimeError", 1, True), End(1, -9, 2, "node2")], Signals(), None, tmp_path)
    assert "rank 1 on node2 was ended by SIGKILL" in capsys.readouterr().err
    ending([failed(0, "UserMistake", 1, False, errors.USER_MISTAKE)], Signals(), None, tmp_path)
    assert capsys.readouterr().err == "", "rank 0 has said it"


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (ValueError("timed out"), False),
        (RuntimeError("shapes (2, 3) do not fit"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (Stalled("Rank 0 waited longer than guard.stall_seconds=4 for another"), True),
        (UserMistake("timeout=3: no such choice"), False),
    ],
)
def test_what_tells_of_another_rank_is_known(error: Exception, follows: bool, tmp_path: Path) -> None:
    record = Failure.of(error, 3)
    assert record.follows is follows
    record.write(tmp_path)
    assert failure.read(tmp_path, 3) == record
    later = KeyError("while cleaning up")
    later.__context__ = error
    assert Failure.of(later, 3).follows is follows, "what was raised at first counts"
    failure.forget(tmp_path)
    assert failure.read(tmp_path, 3) is None
