"""Weights by range: what is read is exactly what was stored, and a folder that is not whole is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distft.errors import UserMistake
from distft.weights.store import FolderWeights, MemoryWeights, Overlay, Renamed, _ranges, read_whole
from distft.weights.write import hash_of, new_folder, write_sharded


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "vector": torch.randn(17),
        "matrix": torch.randn(7, 11).to(torch.bfloat16),
        "stack": torch.randn(3, 4, 5),
        "row": torch.randn(1, 30),
        "deep": torch.randn(2, 3, 2, 3).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "counts": torch.arange(6).view(2, 3),
    }


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_every_range_is_what_was_stored(folder: Path, tensors: dict[str, Tensor]) -> None:
    stored, held = FolderWeights(folder), MemoryWeights(tensors)
    assert set(stored.names()) == set(held.names()) == set(tensors)
    choose = random.Random(0)
    for name, tensor in tensors.items():
        assert stored.shape(name) == held.shape(name) == tuple(tensor.shape)
        assert stored.dtype(name) == held.dtype(name) == tensor.dtype
        assert torch.equal(read_whole(stored, name), tensor)
        for _ in range(40):
            start, stop = sorted(choose.choices(range(tensor.numel() + 1), k=2))
            wanted = tensor.reshape(-1)[start:stop]
            for weights in (stored, held):
                got = weights.read(name, start, stop - start)
                assert got.dtype == tensor.dtype
                assert torch.equal(got, wanted), (name, start, stop)
        for weights in (stored, held):
            with pytest.raises(IndexError):
                weights.read(name, 0, tensor.numel() + 1)


class Counting:
    """A safetensors slice that counts the values it hands out."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.num_read = inner, 0

    def __getitem__(self, index: Any) -> Tensor:
        got = self.inner[index]
        self.num_read += got.numel()
        return got


def test_a_range_reads_no_value_beyond_itself(folder: Path, tensors: dict[str, Tensor]) -> None:
    handle = safe_open(folder / "model.safetensors", "pt")
    for name in ("matrix", "stack", "row", "deep"):
        size = tensors[name].numel()
        for start in range(0, size, 3):
            for stop in range(start, size + 1, 4):
                counting = Counting(handle.get_slice(name))
                _ranges(counting, tuple(tensors[name].shape), start, stop, ())
                assert counting.num_read == stop - start, (name, start, stop)


def test_overlay_and_renamed(tensors: dict[str, Tensor]) -> None:
    base = MemoryWeights({"a": torch.zeros(2), "b": torch.ones(2)})
    over = Overlay(base, MemoryWeights({"b": torch.full((3,), 7.0), "c": torch.zeros(1)}))
    assert over.names() == ["a", "b", "c"]
    assert over.shape("b") == (3,)
    assert over.read("b", 1).tolist() == [7.0, 7.0]
    renamed = Renamed(over, {"x": "b", "y": "b"})
    assert renamed.names() == ["x", "y"]
    assert torch.equal(renamed.read("y"), over.read("b"))
    with pytest.raises(KeyError):
        renamed.read("b")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", "", ".."])
def test_an_index_names_only_safetensors_of_its_folder(folder: Path, name: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": {"vector": "model.safetensors", "matrix": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserMistake, match="refused"):
        FolderWeights(folder)
    index["weight_map"]["matrix"] = "model.safetensors"  # the control: the same index without that name is read
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "matrix" in FolderWeights(folder).names()


@pytest.mark.parametrize("stop", [-5, 4, 0, None])
def test_a_file_of_the_wrong_size_is_refused(folder: Path, stop: int | None) -> None:
    path = folder / "model.safetensors"
    FolderWeights(folder)
    data = path.read_bytes()
    path.write_bytes(data + b"x" if stop is None else data[:stop])
    with pytest.raises(UserMistake, match=r"damaged or incomplete.*Fetch it again"):
        FolderWeights(folder)


def test_an_index_that_promises_too_much(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"vector": "model.safetensors", "absent": "model.safetensors"}}))
    with pytest.raises(UserMistake, match="absent"):
        FolderWeights(folder)
    index.write_text(json.dumps({"weight_map": {"vector": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserMistake, match="lacks 1 of its 1 files, as model-00002-of-00002"):
        FolderWeights(folder)
    index.write_text("{")
    with pytest.raises(UserMistake, match="no index"):
        FolderWeights(folder)


def test_shards_are_written_as_a_stream(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    reused = torch.empty(1000)

    def stream() -> Any:
        for index in range(10):
            yield f"t{index}", reused.fill_(index)  # one buffer for all: the writer must not keep a reference
        yield from tensors.items()

    hashes = write_sharded(tmp_path, stream(), shard_bytes=12_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert {path.name for path in tmp_path.iterdir()} == {*files, "model.safetensors.index.json"}
    assert all((tmp_path / file).stat().st_size < 14_000 for file in files)
    weights = FolderWeights(tmp_path)
    assert torch.equal(weights.read("t3"), torch.full((1000,), 3.0))
    assert {name: hash_of(read_whole(weights, name)) for name in weights.names()} == hashes
    for name, tensor in tensors.items():
        assert torch.equal(read_whole(weights, name), tensor)


def test_one_file_where_it_fits(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors)
    with pytest.raises(ValueError, match="twice"):
        write_sharded(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])


def test_a_hash_sees_a_bit_a_shape_and_a_type() -> None:
    tensor = torch.randn(4, 6)
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    assert hash_of(tensor) == hash_of(tensor.clone().t().contiguous().t())
    hashes = {hash_of(each) for each in (tensor, flipped, tensor.view(6, 4), tensor.view(torch.int32))}
    assert len(hashes) == 4


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "final"

    def fail() -> None:
        with new_folder(target) as staging:
            (staging / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as staging:
        (staging / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError):
        fail()
    assert (target / "one").read_text() == "1"  # what was there stays where the new content fails
    with new_folder(target) as staging:
        (staging / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"]
    with new_folder(target, replace=False) as staging:
        (staging / "three").write_text("3")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
