"""Signals and deadlines: one agreed step is saved, the exit code says so, and the run goes on from there."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from distft import errors
from tests.faults.planted import plant
from tests.faults.runs import Shop, Started, final_weights, records, result

STOPPED = "SIGTERM to the controller, to one rank, to all"
GRACE_SECONDS = 30  # between SIGTERM and SIGKILL: Slurm's KillWait and Kubernetes' default


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("signals"))


def words(strategy: str, num_steps: int) -> list[str]:
    return [f"strategy={strategy}", f"max_steps={num_steps}", "launch.ranks=2"]


def stop(started: Started, target: str) -> None:
    controller = psutil.Process(started.process.pid)
    members = {"controller": [controller], "rank": started.ranks()[1:], "all": [controller, *started.ranks()]}[target]
    for member in members:
        member.send_signal(signal.SIGTERM)


def stopped_and_resumed(shop: Shop, strategy: str, targets: list[str], num_steps: int) -> None:
    """One run, stopped once for each target a few steps after it began, and then left alone."""
    folder, step = shop.folder / f"stopped-{strategy}", 0
    for target in targets:
        with shop.start(folder.name, *words(strategy, num_steps)) as started:
            started.wait_for_step(step + 3)
            stop(started, target)
            began = time.monotonic()
            code, text = started.end()
        assert code == errors.SAVED_AFTER_SIGNAL, text
        assert time.monotonic() - began < GRACE_SECONDS
        ended = result(folder)
        assert ended["status"] == "saved_after_signal"
        step = ended["steps"]
        assert f"Stopped by SIGTERM after step {step}; the checkpoint of this step is complete." in text
        assert "Traceback" not in text
        assert (folder / "checkpoints" / f"step-{step:06d}").is_dir()
        assert records(folder)[-1]["step"] == step, "no rank went on"
    assert step < num_steps
    for name in (folder.name, f"whole-{strategy}"):
        code, text = shop.run(name, *words(strategy, num_steps))
        assert code == errors.DONE, text
    assert [record["step"] for record in records(folder)] == [*range(1, num_steps + 1)]
    assert final_weights(folder) == final_weights(shop.folder / f"whole-{strategy}")


@pytest.mark.trial(STOPPED)
@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_sigterm_saves_one_agreed_step(shop: Shop, strategy: str, tmp_path: Path) -> None:
    stopped_and_resumed(Shop.open(tmp_path), strategy, ["controller", "rank", "all"], 500)


@pytest.mark.trial(STOPPED)
@pytest.mark.thorough
def test_a_second_signal_after_five_seconds_ends_at_once(shop: Shop) -> None:
    with shop.start("twice", *words("fsdp", 100_000), "guard.stall_seconds=100") as started:
        started.wait_for_step(3)
        ranks = started.ranks()
        ranks[1].send_signal(signal.SIGSTOP)  # so that the first cannot be followed
        for seconds in (1.0, 5.5):
            started.process.send_signal(signal.SIGTERM)
            time.sleep(seconds)
        assert started.process.poll() is None, "the same within five seconds is the same request"
        started.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, text = started.end()
    assert code == errors.ENDED_AT_ONCE, text
    assert time.monotonic() - began < 5
    assert "Ended at once by a second SIGTERM" in text
    assert result(shop.folder / "twice")["status"] == "ended_at_once"
    assert not any(rank.is_running() for rank in ranks)


SLEEPS = """
def change(loop):
    import time
    step = loop.Fit.step
    def sleeping(self, batch):
        if self.state.step == 3:
            time.sleep(600)
        return step(self, batch)
    loop.Fit.step = sleeping
"""


@pytest.mark.trial(STOPPED)
@pytest.mark.thorough
def test_a_rank_without_a_controller_ends_at_once_too(shop: Shop) -> None:
    fault = plant(shop.folder / "sleeps", SLEEPS, "distft.loop")
    with shop.start("alone", "strategy=ddp", "max_steps=10", "launch.ranks=1", **fault) as started:
        started.wait_for_step(3)
        for _ in range(2):
            started.process.send_signal(signal.SIGTERM)
            time.sleep(5.5)
        code, text = started.end(seconds=5)
    assert code == errors.ENDED_AT_ONCE, text
    assert "a second SIGTERM" in text


@pytest.mark.trial(STOPPED)
@pytest.mark.thorough
def test_a_deadline_is_met_with_a_checkpoint(shop: Shop) -> None:
    began = time.time()
    code, text = shop.run("deadline", *words("fsdp", 100_000), "launch.deadline=00:01:00", "checkpoint.every=50")
    assert code == errors.SAVED_AFTER_SIGNAL, text
    ended = result(shop.folder / "deadline")
    assert ended["status"] == "saved_before_deadline"
    assert "Stopped for launch.deadline=00:01:00, " in ended["reason"]
    assert f"after step {ended['steps']}; the checkpoint of this step is complete" in text
    saved = shop.folder / "deadline" / "checkpoints" / f"step-{ended['steps']:06d}" / "manifest.json"
    assert saved.stat().st_mtime - began < 60
