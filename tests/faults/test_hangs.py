"""A rank that stands still is named, with what the others wait for, and the run ends: three ways to hang."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from distft import errors
from tests.faults.runs import Shop, Started, records, result

HARM = str(Path(__file__).parent / "harm")
STALL_SECONDS = 4.0
TRIAL = "a rank stopped (SIGSTOP), a sleeping loader, a collective one rank does not join"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("hangs"))


def knobs(strategy: str) -> list[str]:
    return [
        f"strategy={strategy}", "launch.ranks=2", "max_steps=100000", f"guard.stall_seconds={STALL_SECONDS:g}",
        "data.eval_fraction=0",
    ]  # fmt: skip


def wait_for_a_standstill(started: Started) -> float:
    """Until no training record has come for a second; returns when the last one was seen."""
    started.wait_for_step(3)
    last, count = time.monotonic(), 0
    while time.monotonic() - last < 1:
        if (now := len(records(started.folder))) != count:
            last, count = time.monotonic(), now
        time.sleep(0.05)
    return last


def ended_well(started: Started, since: float, ranks: list[psutil.Process]) -> tuple[str, dict[int, str]]:
    """The one sentence and each rank's stacks, after all that holds for every stall has been looked at."""
    code, text = started.end(STALL_SECONDS + 60)
    took = time.monotonic() - since
    assert code == errors.STALLED, text
    assert took < STALL_SECONDS + 10, f"{took:.1f} s"
    assert not any(rank.is_running() for rank in ranks)
    assert result(started.folder)["status"] == "stalled"
    assert "Traceback" not in text
    assert "onnection closed" not in text  # what a survivor would say
    [sentence] = [line for line in text.splitlines() if line.startswith("distft: Rank")]
    logs = started.folder / "logs"
    assert f"resume={started.folder}" in text
    return sentence, {rank: (logs / f"stacks-rank-{rank}.txt").read_text() for rank in range(len(ranks))}


STRATEGIES = ["ddp", *[pytest.param(name, marks=pytest.mark.thorough) for name in ("fsdp", "zero2", "zero3")]]


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_rank(shop: Shop, strategy: str) -> None:
    with shop.start(f"stopped-{strategy}", *knobs(strategy)) as started:
        started.wait_for_step(3)
        ranks = started.ranks()
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGSTOP)
        sentence, stacks = ended_well(started, time.monotonic(), ranks)
    who = rf"Rank 1 \(process {ranks[1].pid}\) on \S+"
    assert re.search(rf"{who} is stopped \(SIGSTOP\) in phase .+ of step \d+ since \S+ \(\d s\)", sentence)
    assert re.search(r"; rank 0 waits for it in collective number \d+, phase .+ of step \d+", sentence)
    assert "in step" in stacks[0] or "in train" in stacks[0]
    assert "is stopped and cannot show its stacks" in stacks[1]
    assert json.loads((started.folder / "logs/heartbeat/stalled.json").read_text())["sentence"] in sentence


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sleeping_loader(shop: Shop, strategy: str) -> None:
    harm = {"PYTHONPATH": HARM, "HARM": "loader", "HARM_RANK": "1"}
    with shop.start(f"loader-{strategy}", *knobs(strategy), **harm) as started:
        since = wait_for_a_standstill(started)
        sentence, stacks = ended_well(started, since, started.ranks())
    assert re.search(r"Rank 1 \(process \d+\) on \S+ waits for its own data of step 6 since \S+ \(\d s\)", sentence)
    assert "sitecustomize.py" in sentence
    waits = r"; rank 0 waits for it in collective number \d+, phase (forward|backward|optimizer step) of step 6"
    assert re.search(waits, sentence)
    assert "sitecustomize.py" in stacks[1]
    assert "sitecustomize.py" not in stacks[0]


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_collective_that_one_rank_does_not_join(shop: Shop, strategy: str) -> None:
    harm = {"PYTHONPATH": HARM, "HARM": "collective", "HARM_RANK": "1"}
    with shop.start(f"collective-{strategy}", *knobs(strategy), **harm) as started:
        since = wait_for_a_standstill(started)
        sentence, stacks = ended_well(started, since, started.ranks())
    who = r"Rank 1 \(process \d+\) on \S+"
    found = re.search(rf"{who} has not joined collective number (\d+), in phase record of step 6", sentence)
    assert found, sentence
    waits = f"; rank 0 waits for it in collective number {found.group(1)}, phase record of step 6 (at all_reduce"
    assert waits in sentence
    assert "in sum_over" in stacks[1]
    assert "in all_reduce" in stacks[0]
    assert "in all_reduce" not in stacks[1]
