"""Files of flat ranges: written tensor by tensor, read range by range, whichever engine and world size wrote them.

A rank's file is plain safetensors. Its tensors are 1-D, called `<kind>/<parameter's name>`; the header's metadata holds
for each the first flat index of its range and the shape of the whole parameter.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distft import heartbeat
from distft.checkpoint.layout import Damaged, FileRecord, Manifest
from distft.strategy.base import Shard
from distft.weights.write import hash_file

PART = 1 << 24  # bytes of a file compared at a time


def key_of(shard: Shard) -> str:
    return f"{shard.kind}/{shard.name}"


def header_of(shards: Sequence[Shard]) -> bytes:
    """What stands before the tensors: safetensors' length and JSON, with every range's place in its parameter."""
    index = {key_of(shard): [shard.start, list(shard.shape)] for shard in shards}
    header: dict[str, Any] = {"__metadata__": {"index": json.dumps(index)}}
    offset = 0
    for shard in shards:
        assert (shard.tensor.dtype, shard.tensor.dim()) == (torch.float32, 1), key_of(shard)
        end = offset + 4 * shard.tensor.numel()
        header[key_of(shard)] = {"dtype": "F32", "shape": [shard.tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return struct.pack("<Q", len(text)) + text


def num_bytes_of(shards: Sequence[Shard]) -> int:
    """Bytes of the file that `write` makes of them."""
    return len(header_of(shards)) + sum(4 * shard.tensor.numel() for shard in shards)


def write(path: Path, shards: Sequence[Shard]) -> FileRecord:
    """Write `shards` and bring them to the disk, one tensor in host memory at a time; hashed as they are written.

    The bytes hashed are those handed to the file system, so that a later reading finds what the disk changed.
    """
    head = header_of(shards)
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file:
        file.write(head)
        digest.update(head)
        for shard in shards:
            heartbeat.beat()
            data: Any = shard.tensor.detach().cpu().contiguous().numpy()
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
        return FileRecord(file.tell(), digest.hexdigest())


def wrong_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files whose content is not what was written; a sentence each."""
    wrong = []
    for name in names:
        try:
            if hash_file(folder / name) != manifest.files[name].xxh3_128:
                wrong.append(f"{folder / name} was changed since it was written (XXH3-128)")
        except OSError as error:
            wrong.append(f"{error.filename or folder} cannot be read: {error.strerror}")
    return wrong


def read_back(path: Path, record: FileRecord) -> str:
    """What the disk gives back of a file that was synced: nothing is wrong (an empty string), or what is.

    The kernel's copy of it in memory is dropped first, so that what is read comes from the disk (or, on a network file
    system, from its server; memory is all that tmpfs has).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if path.stat().st_size != record.num_bytes:
        return f"{path} has {path.stat().st_size} bytes, not the {record.num_bytes} that were written"
    return "" if hash_file(path) == record.xxh3_128 else f"{path} holds other bytes than were written"


def coverage(shards: Iterable[Shard]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By key: number of values in this rank's range, and the whole parameter's shape."""
    return {key_of(shard): (shard.tensor.numel(), shard.shape) for shard in shards}


def complete(parts: Iterable[dict[str, tuple[int, tuple[int, ...]]]]) -> tuple[list[str], dict[str, list[int]]]:
    """Kinds and shapes of what all ranks hold together.

    Raises:
        RuntimeError: the ranks' ranges do not make up whole parameters (an engine's bug, found before it costs a run).
    """
    counts: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        for key, (length, shape) in part.items():
            counts[key] = counts.get(key, 0) + length
            shapes[key] = shape
    for key, count in counts.items():
        if count != math.prod(shapes[key]):
            raise RuntimeError(f"the ranks hold {count} values of {key} {list(shapes[key])} together")
    kinds = sorted({key.split("/", 1)[0] for key in shapes})
    whole = {key.split("/", 1)[1]: list(shape) for key, shape in sorted(shapes.items())}
    return kinds, whole


def incomplete(folder: Path, manifest: Manifest) -> list[str]:
    """Parameters and moments that the ranges of all files do not make up exactly, from the files' headers.

    Raises:
        Damaged: a file is not what `write` makes.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for name in sorted(manifest.files):
        try:
            with safe_open(folder / name, framework="pt") as file:
                index = json.loads(file.metadata()["index"])
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    [length] = file.get_slice(key).get_shape()
                    found.setdefault(key, []).append((int(index[key][0]), length))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{folder / name} cannot be read: {error!r}") from error
    wanted = {f"{kind}/{name}": math.prod(shape) for name, shape in manifest.shapes.items() for kind in manifest.kinds}
    return [key for key in {**wanted, **found} if key not in wanted or not joined(found.get(key, []), wanted[key])]


def joined(parts: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether (start, length) parts follow each other from 0 to `size` without a gap or an overlap."""
    reached = 0
    for start, length in sorted(part for part in parts if part[1]):
        if start != reached:
            return False
        reached += length
    return reached == size


@torch.no_grad()
def read(paths: Sequence[Path], shards: Sequence[Shard]) -> None:
    """Fill `shards` from the files: those parts of each file's ranges that fall into them, and no more.

    `paths`: the most likely file first; reading ends as soon as everything is filled.

    Raises:
        Damaged: a file is not readable, or values are missing.
    """
    missing = {key_of(shard): (shard, shard.tensor.numel()) for shard in shards}
    for path in paths:
        if not missing:
            return
        try:
            with safe_open(path, framework="pt") as file:
                index = json.loads(file.metadata()["index"])
                for key in [key for key in missing if key in index]:
                    heartbeat.beat()
                    shard, left = missing.pop(key)
                    left -= _copy_overlap(file, key, index[key][0], shard)
                    if left > 0:
                        missing[key] = (shard, left)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path} cannot be read: {error}") from error
    if missing:
        raise Damaged(f"{paths[0].parent} has no values for {', '.join(sorted(missing)[:3])}")


def _copy_overlap(file: Any, key: str, start: int, shard: Shard) -> int:
    """Copy what the file's range of `key`, starting at flat index `start`, shares with `shard`; returns how much."""
    stored = file.get_slice(key)
    low = max(start, shard.start)
    high = min(start + stored.get_shape()[0], shard.start + shard.tensor.numel())
    if high <= low:
        return 0
    shard.tensor[low - shard.start : high - shard.start].copy_(stored[low - start : high - start])
    return high - low


def differing(path: Path, shards: Sequence[Shard]) -> list[str]:
    """Keys whose values in the file differ in any bit from `shards`, which are what was written into it.

    What was read of a mapped file counts as this process's memory until the file is closed, so it is opened anew for
    every part of it.
    """
    different = []
    for part in parts_of(shards):
        with safe_open(path, framework="pt") as file:
            for shard in part:
                heartbeat.beat()
                stored: Tensor = file.get_tensor(key_of(shard))
                if not equal_bits(stored, shard.tensor):
                    different.append(key_of(shard))
                del stored
    return different


def parts_of(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Shards in their order, PART bytes or one shard at a time."""
    part: list[Shard] = []
    num_bytes = 0
    for shard in shards:
        part.append(shard)
        num_bytes += 4 * shard.tensor.numel()
        if num_bytes >= PART:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two fp32 tensors, on the host or not, hold the same bits: also where they hold no numbers."""
    return torch.equal(*(tensor.detach().cpu().contiguous().view(torch.int32) for tensor in (one, other)))
