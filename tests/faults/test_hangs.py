"""A rank that stands still is named, with what the others wait for, and the run ends: three ways to hang."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from distft import errors
from tests.faults.runs import Shop, Started, records, result

HARM = str(Path(__file__).parent / "harm")
STALL_SECONDS = 4.0
TRIAL = "a rank stopped (SIGSTOP), a sleeping loader, a collective one rank does not join"
LAST = 5  # the last step that is recorded before harm is done from inside
WHO = r"Rank 1 \(process \d+\) on \S+"
SINCE = r"since \d\d:\d\d:\d\d \(\d+ s\)"
WAITS = r"; rank 0 waits for it in collective number \d+, phase"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("hangs"))


def knobs(strategy: str, *more: str) -> list[str]:
    return [
        f"strategy={strategy}", "launch.ranks=2", "max_steps=100000", f"guard.stall_seconds={STALL_SECONDS:g}",
        "data.eval_fraction=0", *more,
    ]  # fmt: skip


def harm(*kinds: str) -> dict[str, str]:
    """The environment in which rank 1 does itself harm, see harm/sitecustomize.py."""
    return {"PYTHONPATH": HARM, "HARM": ",".join(kinds), "HARM_RANK": "1"}


def wait_for_the_last_step(started: Started) -> tuple[float, list[psutil.Process]]:
    """When it was recorded, and the processes of the ranks."""
    started.wait_for_step(3)
    ranks = started.ranks()
    started.wait_for_step(LAST)
    return time.monotonic(), ranks


def ended_well(started: Started, since: float, ranks: list[psutil.Process]) -> tuple[str, dict[int, str]]:
    """The one sentence and each rank's stacks, after all that holds for every stall has been looked at."""
    code, text = started.end(STALL_SECONDS + 60)
    took = time.monotonic() - since
    assert code == errors.STALLED, text
    [sentence] = said(text)
    assert took < STALL_SECONDS + 10, f"{took:.1f} s"
    assert len(ranks) == 2
    assert not any(map(there, ranks))
    ended = result(started.folder)
    assert ended["status"] == "stalled"
    assert len(records(started.folder)) >= 3
    assert "Traceback" not in text, text
    assert "onnection closed" not in text, "what a survivor would say"
    assert f"resume={started.folder}" in text
    published = json.loads((started.folder / "logs/heartbeat/stalled.json").read_text())
    assert f"distft: {published['sentence']}" == sentence
    logs = started.folder / "logs"
    return sentence, {rank: (logs / f"stacks-rank-{rank}.txt").read_text() for rank in range(len(ranks))}


def there(rank: psutil.Process) -> bool:
    """Whether it still runs: who was killed may wait for its parent's attention."""
    try:
        return rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("distft: Rank")]


STRATEGIES = ["ddp", *[pytest.param(name, marks=pytest.mark.thorough) for name in ("fsdp", "zero2", "zero3")]]


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_rank(shop: Shop, strategy: str) -> None:
    with shop.start(f"stopped-{strategy}", *knobs(strategy)) as started:
        started.wait_for_step(3)
        ranks = started.ranks()
        ranks[1].send_signal(signal.SIGSTOP)
        sentence, stacks = ended_well(started, time.monotonic(), ranks)
    assert re.search(rf"{WHO} is stopped \(SIGSTOP\) in phase .+ of step \d+ {SINCE}{WAITS} .+ of step \d+", sentence)
    assert f"(process {ranks[1].pid})" in sentence
    assert "in train\n" in stacks[0]
    assert "is stopped and cannot show its stacks" in stacks[1]


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sleeping_loader_but_not_a_slow_evaluation(shop: Shop, strategy: str) -> None:
    """One rank's evaluation behind step 3 takes longer than the others may stand still, and goes on all the time."""
    name, slow = f"loader-{strategy}", ("data.eval_fraction=0.3", "eval.every=3")
    with shop.start(name, *knobs(strategy, *slow), **harm("evaluation", "loader")) as started:
        started.wait_for_step(3)
        before = time.monotonic()
        started.wait_for_step(4)
        assert time.monotonic() - before > STALL_SECONDS, "else the evaluation shows nothing"
        since, ranks = wait_for_the_last_step(started)
        sentence, stacks = ended_well(started, since, ranks)
    assert [record["step"] for record in records(started.folder, "eval")] == [3]
    assert re.search(rf"{WHO} waits for its own data of step 6 {SINCE} \(at step, .*sitecustomize\.py:\d+", sentence)
    assert re.search(rf"{WAITS} (forward|backward|optimizer step) of step 6", sentence)
    assert "sitecustomize.py" in stacks[1]
    assert "sitecustomize.py" not in stacks[0]


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_collective_that_one_rank_does_not_join(shop: Shop, strategy: str) -> None:
    with shop.start(f"collective-{strategy}", *knobs(strategy), **harm("collective")) as started:
        since, ranks = wait_for_the_last_step(started)
        sentence, stacks = ended_well(started, since, ranks)
    found = re.search(rf"{WHO} has not joined collective number (\d+), in phase record of step 6 {SINCE}", sentence)
    assert found, sentence
    waits = f"; rank 0 waits for it in collective number {found.group(1)}, phase record of step 6 (at all_reduce"
    assert waits in sentence
    assert "sitecustomize.py" in stacks[1]
    assert "in all_reduce\n" in stacks[0]
    assert "in all_reduce\n" not in stacks[1]


BIN = Path(sys.executable).parent
BY_HAND = {
    "torchrun": (str(BIN / "torchrun"), "--nproc-per-node=2", "--master-port=29741"),
    "deepspeed": (str(BIN / "deepspeed"), "--num_gpus=2", "--master_port=29742"),
}


@pytest.mark.thorough
@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("launcher", BY_HAND)
def test_without_a_controller_a_rank_that_answers_speaks(shop: Shop, launcher: str, stopped: int) -> None:
    by_hand = dataclasses.replace(shop, launcher=BY_HAND[launcher])
    words = [word for word in knobs("ddp") if not word.startswith("launch.ranks")]
    with by_hand.start(f"{launcher}-{stopped}", *words) as started:
        started.wait_for_step(3)
        ranks = started.ranks()
        assert len(ranks) == 2
        ranks[stopped].send_signal(signal.SIGSTOP)
        since = time.monotonic()
        started.wait_for(lambda: not any(map(there, ranks)))
        assert time.monotonic() - since < STALL_SECONDS + 15, "publications come every 5 s"
        code, text = started.end()
    assert code == (errors.STALLED if launcher == "deepspeed" else 1), text  # torchrun has codes of its own
    [sentence] = said(text)
    assert f"Rank {stopped} (process {ranks[stopped].pid})" in sentence
    assert "is stopped (SIGSTOP)" in sentence
    assert f"; rank {1 - stopped} waits for it" in sentence
    assert "closed by peer" not in text
    assert result(started.folder)["status"] == "stalled"
    logs = started.folder / "logs"
    assert "in train\n" in (logs / f"stacks-rank-{1 - stopped}.txt").read_text()
    assert "is stopped" in (logs / f"stacks-rank-{stopped}.txt").read_text()


@pytest.mark.thorough
@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("engine", ["deepspeed", "torchrun"])
def test_a_controller_over_another_launcher(shop: Shop, engine: str) -> None:
    with shop.start(f"engine-{engine}", *knobs("ddp", f"launch.engine={engine}"), **harm("collective")) as started:
        since, ranks = wait_for_the_last_step(started)
        code, text = started.end()
        assert time.monotonic() - since < STALL_SECONDS + 10
    assert code == errors.STALLED, text
    [sentence] = said(text)
    assert re.search(rf"{WHO} has not joined collective number \d+, in phase record of step 6", sentence)
    assert len(ranks) == 2
    assert not any(map(there, ranks))
    assert result(started.folder)["status"] == "stalled"


@pytest.mark.thorough
@pytest.mark.trial(TRIAL)
def test_one_rank_alone_says_it_itself(shop: Shop) -> None:
    with shop.start("alone", *knobs("ddp", "launch.ranks=1"), **harm("loader") | {"HARM_RANK": "0"}) as started:
        code, text = started.end()
    assert code == errors.STALLED, text
    [sentence] = said(text)
    assert re.search(r"Rank 0 \(process \d+\) on \S+ waits for its own data of step 6", sentence)
    assert "waits for it in" not in sentence


@pytest.mark.thorough
@pytest.mark.trial(TRIAL)
def test_a_slow_disk_is_no_stall(shop: Shop) -> None:
    """Rank 1 takes some 10 s to write a checkpoint, rank 0 waits for it all the time at the next one."""
    words = ("max_steps=6", "checkpoint.every=2", "checkpoint.keep=9")
    with shop.start("disk", *knobs("ddp", *words), **harm("checkpoint")) as started:
        code, text = started.end()
    assert code == errors.DONE, text
    took = [path.stat().st_mtime for path in sorted((started.folder / "checkpoints").glob("step-*"))]
    assert len(took) == 3
    assert took[1] - took[0] > 1.5 * STALL_SECONDS, "else this test shows nothing"
    assert not said(text)
