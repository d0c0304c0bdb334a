"""Ranks that die: the first cause is named, and the run goes on from its last checkpoint as if nothing had been."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from distft import errors
from tests.faults.planted import plant
from tests.faults.runs import Shop, Started, final_weights, records, result
from tests.faults.test_signals import STOPPED, stop

KILLED = "kill -9 one rank at a random step, 20 times in one run with restarts"
PORT = "two launches on one folder; the port taken; 1,000 evaluations and saves in a row"
HERE = socket.gethostname()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("restarts"))


def words(strategy: str, tuning: str, num_steps: int, max_restarts: int = 0) -> list[str]:
    fixed = [f"strategy={strategy}", f"tuning={tuning}", f"max_steps={num_steps}", "launch.ranks=2"]
    restarts = [f"launch.max_restarts={max_restarts}", "launch.restart_seconds=0"] if max_restarts else []
    return [*fixed, "checkpoint.every=5", *restarts]


def whole(shop: Shop, strategy: str, tuning: str, num_steps: int) -> dict[str, bytes]:
    """The final weights of the run that nothing happens to; run once."""
    name = f"whole-{strategy}-{tuning}-{num_steps}"
    if not (shop.folder / name / "final").exists():
        code, text = shop.run(name, *words(strategy, tuning, num_steps))
        assert code == errors.DONE, text
    return final_weights(shop.folder / name)


def newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-" + "[0-9]" * 6)), default=0)


def trained(started: Started, known: set[int]) -> list[psutil.Process]:
    """The ranks of the next start, once they have written a checkpoint; `known`: process ids of those before."""

    def ranks() -> list[psutil.Process]:
        found = started.ranks()
        return found if len(found) == 2 and not known & {rank.pid for rank in found} else []

    started.wait_for(ranks)
    step = newest(started.folder)  # those before are gone, also the one that had still published a checkpoint
    started.wait_for(lambda: newest(started.folder) > step)
    found: list[psutil.Process] = started.wait_for(ranks)
    known |= {rank.pid for rank in found}
    return found


def restarts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "restarts.jsonl").read_text().splitlines()]


def nothing_is_left(folder: Path, known: set[int]) -> None:
    left = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert not left
    for pid in known:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, pid


def kill_often(shop: Shop, strategy: str, tuning: str, num_kills: int, num_steps: int) -> None:
    """`num_kills` times: wait for a new checkpoint, then kill a random rank a random moment later."""
    name, chance, known = f"killed-{strategy}-{tuning}", random.Random(strategy + tuning), set[int]()
    killed: list[tuple[int, float]] = []
    with shop.start(name, *words(strategy, tuning, num_steps, max_restarts=num_kills)) as started:
        for _ in range(num_kills):
            ranks = trained(started, known)
            time.sleep(chance.uniform(0, 0.3))
            victim = chance.randrange(2)
            ranks[victim].kill()
            killed.append((victim, time.time()))
        code, text = started.end()
    assert code == errors.DONE, text
    named = re.findall(r"distft: rank (\d) on (\S+) was ended by SIGKILL", text)
    assert named == [(str(victim), HERE) for victim, _ in killed], text
    told = restarts(shop.folder / name)
    assert [record["rank"] for record in told] == [victim for victim, _ in killed]
    assert all(record["time"] - moment < 10 for record, (_, moment) in zip(told, killed, strict=True)), told
    assert len({record["step"] for record in told}) == num_kills, "each start got further"
    nothing_is_left(shop.folder / name, known)
    assert [record["step"] for record in records(shop.folder / name)] == [*range(1, num_steps + 1)]
    assert (shop.folder / name / "metrics.abandoned.jsonl").exists()
    assert final_weights(shop.folder / name) == whole(shop, strategy, tuning, num_steps)


@pytest.mark.trial(KILLED)
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("strategy", "tuning"), [("fsdp", "full"), ("zero2", "full"), ("zero3", "full"), ("fsdp", "lora")]
)
def test_killed_twenty_times(shop: Shop, strategy: str, tuning: str) -> None:
    kill_often(shop, strategy, tuning, num_kills=20, num_steps=400)


RAISES_ONCE = """
def change(loop):
    step = loop.Fit.step
    def raising(self, batch):
        mark = {mark!r}
        if os.environ.get("RANK") == "1" and self.state.step >= {at} and not os.path.exists(mark):
            open(mark, "w").close()
            raise ValueError("planted in rank 1")
        return step(self, batch)
    loop.Fit.step = raising
"""


@dataclass
class Eventful:
    """One run with three events: a killed rank, one that raises, and SIGTERM to all; then resumed and left alone."""

    folder: Path
    codes: tuple[int, int]
    texts: tuple[str, str]
    pids: set[int]
    stopped_at: int
    status: str


NUM_STEPS, RAISES_AT = 200, 60


@pytest.fixture(scope="module")
def eventful(shop: Shop) -> Eventful:
    name, pids = "eventful", set[int]()
    mark = str(shop.folder / "raised")
    fault = plant(shop.folder / "fault", RAISES_ONCE.format(mark=mark, at=RAISES_AT), "distft.loop")
    with shop.start(name, *words("fsdp", "full", NUM_STEPS, max_restarts=2), **fault) as started:
        trained(started, pids)[0].kill()
        started.wait_for_step(RAISES_AT + 10)
        ranks = started.ranks()
        pids |= {rank.pid for rank in ranks}
        stop(started, "all")
        first = started.end()
    ended = result(shop.folder / name)
    second = shop.run(name, *words("fsdp", "full", NUM_STEPS))
    codes, texts = zip(first, second, strict=True)
    return Eventful(shop.folder / name, codes, texts, pids, ended["steps"], ended["status"])


@pytest.mark.trial(KILLED)
def test_a_killed_rank_then_one_that_raises(eventful: Eventful) -> None:
    """Each is named, not the survivor with its broken connection, and each start goes on from the last checkpoint."""
    text = eventful.texts[0]
    assert f"distft: rank 0 on {HERE} was ended by SIGKILL" in text
    assert f"distft: rank 1 on {HERE} failed with ValueError: planted in rank 1 (" in text
    first, second = restarts(eventful.folder)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert 0 < first["step"] < second["step"] <= RAISES_AT
    nothing_is_left(eventful.folder, eventful.pids)


@pytest.mark.trial(STOPPED)
def test_a_signal_to_all_saves_one_agreed_step(eventful: Eventful) -> None:
    """The controller alone is stopped in tests/entry, each target under each engine in the longer form."""
    assert eventful.codes[0] == errors.SAVED_AFTER_SIGNAL, eventful.texts[0]
    assert eventful.status == "saved_after_signal"
    step = eventful.stopped_at
    assert f"Stopped by SIGTERM after step {step}; the checkpoint of this step is complete." in eventful.texts[0]
    assert f"Going on after step {step} of {NUM_STEPS}" in eventful.texts[1]


@pytest.mark.trial(KILLED)
def test_the_run_ends_as_if_nothing_had_been(shop: Shop, eventful: Eventful) -> None:
    assert eventful.codes[1] == errors.DONE, eventful.texts[1]
    assert [record["step"] for record in records(eventful.folder)] == [*range(1, NUM_STEPS + 1)]
    assert final_weights(eventful.folder) == whole(shop, "fsdp", "full", NUM_STEPS)


ALWAYS_DIES = """
if os.environ.get("RANK") == "1":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.trial(KILLED)
@pytest.mark.thorough
def test_a_rank_that_never_starts_is_left_out_or_ends_the_run(shop: Shop) -> None:
    fault = plant(shop.folder / "dies", ALWAYS_DIES)
    code, text = shop.run("fewer", *words("fsdp", "full", 20, max_restarts=3), "launch.min_ranks=1", **fault)
    assert code == errors.DONE, text
    assert "Restart 2 of 3 from the beginning with 1 rank" in text
    assert [record["ranks"] for record in restarts(shop.folder / "fewer")] == [2, 1]
    ended = result(shop.folder / "fewer")
    assert (ended["status"], ended["steps"]) == ("done", 20)

    code, text = shop.run("none", *words("fsdp", "full", 20, max_restarts=3), **fault)
    assert code == errors.BUG, text
    assert "Not started again: no checkpoint was written between the last two crashes" in text
    ended = result(shop.folder / "none")
    assert ended["status"] == "failed"
    assert ended["reason"].startswith(f"rank 1 on {HERE} was ended by SIGKILL")


TAKES_THE_PORT = """
if os.environ.get("RANK") == "0" and not os.path.exists({mark!r}):
    import socket
    open({mark!r}, "w").close()
    taken = socket.socket(socket.AF_INET6)
    taken.bind(("::", int(os.environ["MASTER_PORT"])))
    taken.listen()
"""


@pytest.mark.trial(PORT)
@pytest.mark.thorough
@pytest.mark.parametrize("engine", ["direct", "deepspeed"])
def test_a_port_that_is_taken_costs_a_start_and_no_more(shop: Shop, engine: str) -> None:
    fault = plant(shop.folder / f"takes-{engine}", TAKES_THE_PORT.format(mark=str(shop.folder / f"taken-{engine}")))
    words = ("strategy=ddp", "max_steps=3", "launch.ranks=2", f"launch.engine={engine}")
    code, text = shop.run(f"port-{engine}", *words, **fault)
    assert code == errors.DONE, text
    assert "The port that was chosen is taken; another one is tried." in text
    assert "Traceback" not in text


@pytest.mark.trial(KILLED)
@pytest.mark.thorough
def test_no_rank_outlives_its_controller(shop: Shop) -> None:
    with shop.start("orphans", *words("fsdp", "full", 100_000)) as started:
        started.wait_for_step(5)
        ranks = started.ranks()
        started.process.kill()
        gone, left = psutil.wait_procs(ranks, timeout=30)
        assert len(gone) == 2, left
    nothing_is_left(shop.folder / "orphans", {rank.pid for rank in ranks})
    assert newest(shop.folder / "orphans") > 0, "they saved first"
    assert result(shop.folder / "orphans")["status"] == "saved_after_signal"
