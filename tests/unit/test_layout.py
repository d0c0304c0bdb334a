"""The checkpoint folder: what counts as complete, what stays, and that ranges come back whoever cut them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distft.checkpoint import layout, ranges
from distft.checkpoint.layout import Damaged, FileRecord, Manifest
from distft.checkpoint.state import TrainState
from distft.strategy.base import Shard


def write_step(run_dir: Path, step: int, text: str = "ranges") -> Path:
    """A complete checkpoint with one file of any content."""
    folder = layout.begin(run_dir, step, f"{step:08x}")
    (folder / "rank-00000.safetensors").write_text(text)
    record = FileRecord(len(text), ranges.hash_file(folder / "rank-00000.safetensors"))
    state = vars(TrainState(step))
    return layout.commit(folder, Manifest(step, "ddp", 1, ["param"], {}, {"rank-00000.safetensors": record}, state))


def test_a_step_is_complete_once_it_is_committed(tmp_path: Path) -> None:
    assert layout.steps(tmp_path) == []
    assert layout.latest(tmp_path) is None
    write_step(tmp_path, 10)
    folder = layout.begin(tmp_path, 20, "aa")
    (folder / "rank-00000.safetensors").write_text("half")
    assert layout.steps(tmp_path) == [10]
    assert layout.latest(tmp_path) == tmp_path / "checkpoints" / "step-000010"
    layout.begin(tmp_path, 30, "bb")
    assert not folder.exists(), "what a killed run left over goes"


def test_what_dead_saves_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    assert layout.clean(tmp_path) == []
    write_step(tmp_path, 10)
    kept = [tmp_path / "final", tmp_path / "final.tmp-mine", tmp_path / "checkpoints" / "step-000020.tmp"]
    dead = [tmp_path / "checkpoints" / "step-000020.tmp-4f2a91c0", tmp_path / "checkpoints" / "step-000005.tmp-dead",
            tmp_path / "final.tmp-0123abcd", tmp_path / "final.old-0123abcd"]  # fmt: skip
    for path in [*kept, *dead]:
        path.mkdir()
        (path / "file").write_text("x")
    (tmp_path / "checkpoints" / "latest.tmp").write_text("{")
    assert sorted(layout.clean(tmp_path)) == sorted(path.name for path in dead)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in dead)
    assert not (tmp_path / "checkpoints" / "latest.tmp").exists()
    layout.check(layout.step_folder(tmp_path, 10))


def test_the_newest_comes_first_and_a_checkpoint_stands_for_itself(tmp_path: Path) -> None:
    for step in (5, 1_000_000, 40):
        write_step(tmp_path, step)
    assert [path.name for path in layout.candidates(tmp_path)] == ["step-1000000", "step-000040", "step-000005"]
    one = layout.step_folder(tmp_path, 40)
    assert layout.candidates(one) == [one]


def test_retention(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write_step(tmp_path, step)
    assert layout.retain(tmp_path, current=50, keep=2, best=20) == [20, 40, 50]
    assert layout.steps(tmp_path) == [20, 40, 50]
    write_step(tmp_path, 45)  # the run went back to 40 and goes on from there: 50 is of another past
    assert layout.retain(tmp_path, current=45, keep=2, best=None) == [40, 45]
    assert layout.retain(tmp_path, current=45, keep=0, best=None) == [45], "the one just saved stays in any case"
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step-000045"]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    write_step(tmp_path, 10, "before")
    folder = write_step(tmp_path, 10, "after it")
    assert (folder / "rank-00000.safetensors").read_text() == "after it"
    layout.check(folder)


@pytest.mark.parametrize("part", ["step", "state", "files", "sha256", "latest"])
def test_a_changed_manifest_is_noticed(tmp_path: Path, part: str) -> None:
    folder = write_step(tmp_path, 10)
    assert layout.check(folder) == Manifest.read(folder)
    if part == "latest":  # a manifest that is sound in itself, but not the one that was committed
        other = Manifest(10, "fsdp", 1, ["param"], {}, Manifest.read(folder).files, vars(TrainState(10)))
        (folder / layout.MANIFEST).write_text(other.text())
    else:
        text = (folder / layout.MANIFEST).read_text()
        position = text.index(f'"{part}"') + len(part) + 3
        digit = next(index for index in range(position, len(text)) if text[index].isdigit())
        (folder / layout.MANIFEST).write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    with pytest.raises(Damaged, match=r"manifest\.json"):
        layout.check(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "sha256": "x"}', "null", "\udc80"])
def test_what_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / layout.MANIFEST).write_text(content, errors="surrogateescape")
    with pytest.raises(Damaged):
        Manifest.read(tmp_path)


# --- ranges ----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (7, 5),
    "a.bias": (7,),
    "scale": (),
    "b.weight": (3, 4, 2),
    "one": (1,),
}
WHOLE = {
    f"{kind}/{name}": torch.randn(max(1, torch.Size(shape).numel()), generator=torch.Generator().manual_seed(seed))
    for seed, (name, shape) in enumerate(SHAPES.items())
    for kind in ("param", "exp_avg")
}


def cut(num_ranks: int, seed: int, empty: bool = False) -> list[list[Shard]]:
    """Every parameter cut into ranges at random places, one a rank; some ranks get nothing of some."""
    dice = random.Random(seed)
    ranks: list[list[Shard]] = [[] for _ in range(num_ranks)]
    for name, shape in SHAPES.items():
        length = torch.Size(shape).numel()
        places = [0, *sorted(dice.randint(0, length) for _ in range(num_ranks - 1)), length]
        for rank, (start, end) in enumerate(pairwise(places)):
            if end > start:
                for kind in ("param", "exp_avg"):
                    values = WHOLE[f"{kind}/{name}"][start:end].clone()
                    ranks[rank].append(Shard(name, kind, shape, start, values.zero_() if empty else values))
    return ranks


def write_ranks(folder: Path, ranks: list[list[Shard]]) -> list[Path]:
    paths = [folder / layout.rank_file(rank) for rank in range(len(ranks))]
    for path, shards in zip(paths, ranks, strict=True):
        record = ranges.write(path, shards)
        assert record == FileRecord(path.stat().st_size, ranges.hash_file(path))
    return paths


@pytest.mark.parametrize("seed", range(8))
def test_ranges_come_back_on_any_number_of_ranks(tmp_path: Path, seed: int) -> None:
    paths = write_ranks(tmp_path, cut(1 + seed % 5, seed))
    for rank, shards in enumerate(cut(1 + (3 * seed) % 4, seed + 100, empty=True)):
        first = rank % len(paths)
        ranges.read([*paths[first:], *paths[:first]], shards)
        for shard in shards:
            expected = WHOLE[ranges.key_of(shard)][shard.start : shard.start + shard.tensor.numel()]
            assert torch.equal(shard.tensor, expected), shard.name


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    (path,) = write_ranks(tmp_path, cut(1, 0))
    assert {key: tensor.tolist() for key, tensor in load_file(path).items()} == {
        key: values.tolist() for key, values in WHOLE.items()
    }


def test_a_rank_without_ranges_writes_a_readable_file(tmp_path: Path) -> None:
    (path,) = write_ranks(tmp_path, [[]])
    assert load_file(path) == {}
    ranges.read([path], [])


def test_only_the_files_that_are_needed_are_read(tmp_path: Path) -> None:
    ranks = cut(3, 1)
    paths = write_ranks(tmp_path, ranks)
    empty = cut(3, 1, empty=True)[1]
    ranges.read([paths[1], tmp_path / "is not there"], empty)
    assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(empty, ranks[1], strict=True))


def test_missing_values_are_noticed(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, cut(3, 1))
    with pytest.raises(Damaged, match="has no values for"):
        ranges.read(paths[:2], cut(1, 0, empty=True)[0])
    paths[2].write_bytes(b"not safetensors")
    with pytest.raises(Damaged, match="rank-00002"):
        ranges.read(paths, cut(1, 0, empty=True)[0])


def test_ranges_that_do_not_make_up_parameters_are_an_error() -> None:
    ranks = cut(3, 2)
    kinds, shapes = ranges.complete(ranges.coverage(shards) for shards in ranks)
    assert kinds == ["exp_avg", "param"]
    assert shapes == {name: list(shape) for name, shape in SHAPES.items()}
    with pytest.raises(RuntimeError, match="together"):
        ranges.complete(ranges.coverage(shards) for shards in [*ranks, ranks[0]])
    with pytest.raises(RuntimeError, match="together"):
        ranges.complete(ranges.coverage(shards) for shards in ranks[1:])


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    shards = cut(1, 0)[0]
    (path,) = write_ranks(tmp_path, [shards])
    assert ranges.differing(path, shards) == []
    content, digest = path.read_bytes(), ranges.hash_file(path)
    for position in (3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert ranges.hash_file(path) != digest
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(ranges.differing(path, shards)) == 1
    # a sign of zero and the bits of a NaN count too
    zeros = [Shard("z", "param", (2,), 0, torch.tensor([0.0, float("nan")]))]
    ranges.write(path, zeros)
    assert ranges.differing(path, zeros) == []
    assert ranges.differing(path, [Shard("z", "param", (2,), 0, torch.tensor([-0.0, float("nan")]))])


# --- killed at any instant -------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from distft.checkpoint import layout
from tests.unit.test_layout import write_step
write_step(Path(sys.argv[1]), 1)
print("started", flush=True)
for step in range(1, 100000):
    write_step(Path(sys.argv[1]), step % 50 + 1, "x" * 1000)
    layout.retain(Path(sys.argv[1]), step % 50 + 1, 3, None)
"""


def test_killed_at_any_instant_what_is_there_is_whole(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), root], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    for number in range(30):
        time.sleep(0.02 + 0.001 * number)
        os.kill(process.pid, signal.SIGSTOP)
        assert_sound(tmp_path)
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()
    assert_sound(tmp_path)
    write_step(tmp_path, 60)
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))


def assert_sound(run_dir: Path) -> None:
    """There is a step, and whatever is named a step can be taken up."""
    assert layout.candidates(run_dir)
    for folder in layout.candidates(run_dir):
        manifest: Any = Manifest.read(folder)
        for name, record in manifest.files.items():
            assert (folder / name).stat().st_size == record.num_bytes
            assert ranges.hash_file(folder / name) == record.xxh3_128
