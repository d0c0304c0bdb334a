"""Safetensors folders written as a stream: a shard in memory at a time, on disk before the folder gets its name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from distft import heartbeat

SHARD_BYTES = 2 * 1024**3
BLOCK = 1 << 22  # bytes hashed at a time: what a processor's cache holds


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end: readers see all of it or none of it.

    A `target` that exists by then is replaced, or kept if not `replace` (a cache, where another process was faster and
    wrote the same). Where filling fails, nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            heartbeat.beat()
            fsync(path)
        if target.exists() and not replace:
            shutil.rmtree(staging)
            return
        retired = target.with_name(f"{target.name}.old-{uuid.uuid4().hex[:8]}")
        if target.exists():
            target.rename(retired)
        staging.rename(target)
        fsync(target.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """XXH3-128 of a whole file, in hexadecimal."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(block):
            heartbeat.beat()
            digest.update(block[:length])
    return digest.hexdigest()


def hash_of(tensor: Tensor) -> str:
    """XXH3-128 of a tensor's bytes, in hexadecimal; shape and element type are part of it."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_sharded(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], stem: str = "model", shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write tensors into `folder` as `<stem>.safetensors`, or as numbered shards with an index (the Hub's layout).

    Holds no more than one shard of `shard_bytes` and one tensor in memory. Returns the XXH3-128 of every tensor.
    """
    hashes: dict[str, str] = {}
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    num_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal num_bytes
        save_file(pending, folder / f"{stem}-{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        num_bytes = 0

    for name, tensor in tensors:
        heartbeat.beat()
        if name in hashes:
            raise ValueError(f"{name} was written twice")
        size = tensor.numel() * tensor.element_size()
        if pending and num_bytes + size > shard_bytes:
            flush()
        # A copy of its own: the caller may reuse the tensor's memory for the next one.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        hashes[name] = hash_of(pending[name])
        num_bytes += size
        total_bytes += size
    flush()

    if len(shards) == 1:
        (folder / f"{stem}-0.part").rename(folder / f"{stem}.safetensors")
        return hashes
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}-{index}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return hashes
