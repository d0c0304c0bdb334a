"""A disk without room for a checkpoint: the run stops or goes on by its policy; what was saved before still loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distft import errors
from distft.checkpoint import layout, ranges
from distft.checkpoint.behind import WriteBehind
from distft.checkpoint.ranks import DiskFull
from distft.checkpoint.space import MARGIN, mount_of
from distft.checkpoint.state import TrainState, owned
from distft.log.lines import Lines
from distft.world import World
from tests.faults import forked
from tests.faults.runs import Shop, final_weights, records
from tests.parity.engine import Case, prepared, run_of, train
from tests.parity.reference import Recipe
from tests.parity.test_behind import taken_up
from tests.pool import Pool
from tests.required import cannot

TRIAL = "disk full while saving (a small tmpfs)"
CASE = Case("fsdp", 1, Recipe(optimizer="adamw", lr=0.01))
MODEL = ["model.tiny.hidden_size=64", "model.tiny.intermediate_size=1024", "strategy=fsdp", "max_steps=8",
         "checkpoint.every=2"]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB, with nothing else on it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=2000", "distft-trial", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        cannot("faults", f"it cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take room with a real file until about `leave` bytes are free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb") as file:
        if (taken := shutil.disk_usage(disk).free - leave) > 0:
            os.posix_fallocate(file.fileno(), 0, taken)
    return filler


def test_without_a_small_disk_the_ci_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_REQUIRE", "gpu,faults")
    with pytest.raises(pytest.fail.Exception, match="required"):
        cannot("faults", "no tmpfs")
    monkeypatch.setenv("DISTFT_REQUIRE", "gpu")
    with pytest.raises(pytest.skip.Exception):
        cannot("faults", "no tmpfs")


# --- inside a save, on two ranks --------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a rank saw of the save that met a full disk, and of the one after it."""

    told: list[str]
    raised: str
    there: list[str]
    after: list[int]


class FillsUp:
    """Takes the room of the disk at the moment when this process opens or renames a file to this name, once."""

    def __init__(self, disk: Path, name: str, leave: int) -> None:
        self.disk, self.name, self.leave, self.active = disk, name, leave, True
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        place = {"open": 0, "os.rename": 1}.get(event)
        if place is not None and self.active and str(args[place]).endswith(self.name):
            self.active = False
            fill(self.disk, self.leave)


def saves(world: World, disk: Path, on_full: str, when: str) -> Seen:
    """Save 1 has room, save 2 has none (by `when`), save 3 has room again."""
    run = run_of(CASE)
    run.checkpoint.keep, run.checkpoint.background, run.checkpoint.on_full = 2, True, on_full
    strategy = prepared(world, CASE)
    train(strategy, world, CASE, 0)
    told: list[str] = []
    checkpoints = WriteBehind(run, disk / "run", strategy, world, told.append)
    checkpoints.save(TrainState(1))
    checkpoints.wait()
    num_bytes = ranges.num_bytes_of(owned(strategy))
    train(strategy, world, CASE, 1)
    if when == "before" and world.is_main:
        fill(disk, leave=num_bytes)  # not enough for both ranks, nor for what must stay free
    elif when == "inside" and world.rank == 1:
        FillsUp(disk, layout.rank_file(1), leave=num_bytes // 2)
    elif when == "manifest" and world.is_main:
        FillsUp(disk, layout.MANIFEST, leave=0)
    elif when == "files" and world.is_main:
        for number in range(5000):
            try:
                (disk / f"file-{number}").touch()
            except OSError:
                break
    dist.barrier()
    raised = ""
    try:
        checkpoints.save(TrainState(2))
        checkpoints.wait()
    except DiskFull as full:
        raised = str(full)
    there = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    dist.barrier()
    if world.is_main:
        (disk / "filler").unlink(missing_ok=True)
        for path in disk.glob("file-*"):
            path.unlink()
    dist.barrier()
    checkpoints.save(TrainState(3))
    checkpoints.wait(needed=True)
    return Seen(told, raised, there, layout.steps(disk / "run"))


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("on_full", ["stop", "skip"])
@pytest.mark.parametrize(
    ("when", "named"),
    [
        ("before", "needs "),
        ("inside", "rank 1: No space left on device"),
        ("manifest", "No space left on device"),
        ("files", "No space left on device"),
    ],
)
def test_what_a_save_without_room_leaves(pool: Any, small_disk: Path, on_full: str, when: str, named: str) -> None:
    ranks: Pool = pool(2)
    for rank, seen in enumerate(ranks.run(saves, small_disk, on_full, when)):
        assert seen.there == ["latest", "step-000001"], "nothing half published"
        assert seen.after == [1, 3], "the next one is written"
        if on_full == "stop":
            assert named in seen.raised
            assert "checkpoint.on_full=skip" in seen.raised
            assert seen.told == []
        else:
            assert seen.raised == ""
            assert [named in text for text in seen.told] == ([True] if rank == 0 else [])
        for text in [seen.raised, *seen.told]:
            assert not text or str(small_disk) in text
    assert ranks.run(taken_up, CASE, layout.step_folder(small_disk / "run", 1))[0][0] == 1, "the one before loads"
    assert mount_of(small_disk / "run" / "checkpoints") == small_disk


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_wait_for_room(small_disk: Path) -> None:
    told: list[str] = []
    lines = Lines(small_disk / "metrics.jsonl", None, told.append)
    records = [{"step": step, "text": "x" * 1000} for step in range(60)]
    for record in records[:10]:
        lines.write(record)
    filler = fill(small_disk, leave=0)
    for record in records[10:40]:
        lines.write(record)
    assert len(told) == 1
    assert "metrics.jsonl cannot be written (No space left on device)" in told[0]
    assert len(lines.path.read_bytes()) < 20_000
    filler.unlink()
    for record in records[40:]:
        lines.write(record)
    lines.close()
    assert [json.loads(line) for line in lines.path.read_text().splitlines()] == records


# --- a whole run ------------------------------------------------------------------------------------------------------


def launch(shop: Shop, name: str, *knobs: str, before: Callable[[], object] | None = None) -> tuple[int, str]:
    """A run of one rank, started as by a launcher."""
    words = shop.words(name, *MODEL, *knobs)
    [code], text = forked.start(words, 1, shop.folder / f"{name}.txt", before).end()
    return code, text


@pytest.mark.trial(TRIAL)
def test_a_run_stops_or_goes_on_by_its_policy(tmp_path: Path, small_disk: Path) -> None:
    shop = Shop.open(tmp_path)
    code, text = launch(shop, "whole")
    assert code == errors.DONE, text
    needed = sum(path.stat().st_size for path in (tmp_path / "whole/checkpoints/step-000008").glob("*.safetensors"))
    assert needed > MARGIN, "else the margin decides"

    for policy, leave in (("stop", 0), ("skip", MARGIN + needed // 2)):
        folder = small_disk / policy
        knobs = (f"run.dir={folder}", f"checkpoint.on_full={policy}")
        others = partial(FillsUp, small_disk, f"/{layout.LATEST}", leave=leave)  # once the first one is published
        code, text = launch(shop, policy, *knobs, before=others)
        assert "Traceback" not in text, text
        assert f"The checkpoint of step 4 needs {needed:,} bytes" in text
        assert f"the disk of run.dir ({small_disk}) has" in text
        assert layout.steps(folder) == [2]
        assert not list((folder / "checkpoints").glob("*.tmp*"))
        if policy == "stop":
            assert code == errors.USER_MISTAKE, text
            assert "checkpoint.on_full=skip" in text
        else:
            assert code == errors.DONE, text
            assert text.count("The run goes on without this checkpoint") == 3  # of steps 4, 6 and 8
            assert final_weights(folder) == final_weights(tmp_path / "whole")
        (small_disk / "filler").unlink()
        code, text = launch(shop, policy, *knobs)
        assert code == errors.DONE, text
        assert "Going on after step 2 of 8" in text
        assert final_weights(folder) == final_weights(tmp_path / "whole")
        assert [record["step"] for record in records(folder)] == list(range(1, 9))
        shutil.rmtree(folder)
