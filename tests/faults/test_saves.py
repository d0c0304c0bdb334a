"""Killed inside a save: the next launch takes a complete checkpoint and ends on the same bits as an unharmed run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from distft import errors
from distft.checkpoint import layout
from tests.faults import forked
from tests.faults.killing.sitecustomize import POINTS
from tests.faults.runs import Shop, final_weights, records

KILLED = "kill -9 at each point inside a save (before, half a shard, before manifest, before rename, before `latest`)"
KNOBS = ["max_steps=6", "checkpoint.every=2", "launch.ranks=2"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("saves"))


def slug(*words: str) -> str:
    """A folder's name of them."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words))


def train(shop: Shop, name: str, *knobs: str, **environment: str) -> tuple[list[int], str]:
    words = shop.words(name, *KNOBS, *knobs)
    return forked.start(words, 2, shop.folder / f"{name}.txt", **environment).end()


def reference(shop: Shop, knobs: list[str]) -> dict[str, bytes]:
    """The final weights of a run that nothing happened to, made once for these knobs."""
    name = slug("whole", *knobs)
    if not (shop.folder / name / "final").exists():
        codes, text = train(shop, name, *knobs)
        assert codes == [0, 0], text
    return final_weights(shop.folder / name)


def assert_goes_on(folder: Path, point: str, text: str, whole: dict[str, bytes], killed_at: int) -> None:
    """After the second launch: from where it went on, what it deleted, and that nothing of the kill is left."""
    published = point in ("before latest", "while an old one goes")
    taken = killed_at if published else killed_at - 2
    if taken:
        assert f"Going on after step {taken} of 6" in text
    left_over = point in ("half a shard", "before manifest", "before rename")
    assert ("interrupted save left over is deleted: step-" in text) == left_over, text
    assert "damaged" not in text
    assert final_weights(folder) == whole
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 5, 6]
    old = [2] if point == "while an old one goes" else []  # it goes at the next save, and here is none
    assert layout.steps(folder) == [*old, 4, 6]
    assert not list((folder / "checkpoints").glob("*.tmp*"))
    for step in layout.steps(folder):
        layout.check(layout.step_folder(folder, step))


def kill_and_go_on(shop: Shop, knobs: list[str], point: str, save: int = 2) -> None:
    whole = reference(shop, knobs)
    name = slug(point, str(save), *knobs)
    rank = 1 if point == "half a shard" else 0
    codes, text = train(shop, name, *knobs, KILL_AT=f"{point},{rank},{save}")
    assert codes[rank] == -signal.SIGKILL, text
    assert codes[1 - rank] != 0, text
    killed_at = 6 if point == "while an old one goes" else 2 * save
    codes, text = train(shop, name, *knobs)
    assert codes == [0, 0], text
    assert_goes_on(shop.folder / name, point, text, whole, killed_at)


SHORT = {("strategy=fsdp", "half a shard"), ("strategy=fsdp", "before latest")}
CASES = [
    pytest.param(
        knobs, point, id=f"{'-'.join(knobs)}-{point}",
        marks=[] if ("-".join(knobs), point) in SHORT else pytest.mark.thorough,
    )
    for knobs in (["strategy=fsdp"], ["strategy=zero2"], ["strategy=zero3"], ["strategy=fsdp", "tuning=lora"])
    for point in POINTS
]  # fmt: skip


@pytest.mark.trial(KILLED)
@pytest.mark.parametrize(("knobs", "point"), CASES)
def test_killed_at_each_point_of_a_save(shop: Shop, knobs: list[str], point: str) -> None:
    kill_and_go_on(shop, knobs, point, save=1 if point == "while an old one goes" else 2)


@pytest.mark.thorough
@pytest.mark.trial(KILLED)
def test_killed_in_the_very_first_save(shop: Shop) -> None:
    kill_and_go_on(shop, ["strategy=fsdp"], "before manifest", save=1)


@pytest.mark.thorough
@pytest.mark.trial(KILLED)
@pytest.mark.parametrize("point", POINTS[:5])
def test_killed_inside_a_save_of_a_run_as_a_person_starts_it(shop: Shop, point: str) -> None:
    knobs = ["strategy=fsdp"]
    whole = reference(shop, knobs)
    rank = 1 if point == "half a shard" else 0
    name = slug("started", point)
    path = os.pathsep.join([str(forked.KILLING), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, text = shop.run(name, *KNOBS, *knobs, KILL_AT=f"{point},{rank},2", PYTHONPATH=path)
    assert code == errors.BUG, text
    assert f"rank {rank}" in text
    assert "SIGKILL" in text
    code, text = shop.run(name, *KNOBS, *knobs)
    assert code == errors.DONE, text
    assert_goes_on(shop.folder / name, point, text, whole, 4)
