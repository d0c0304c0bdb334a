"""Reads W&B's offline records, to see what a viewer would see.

A `.wandb` file is a LevelDB log: after a header of 7 bytes, blocks of 32 KiB hold records in pieces, each with a
checksum, a length and whether it is whole, first, middle or last; a record is the protobuf `wandb_internal.Record`.
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<4sHB")  # ":W&B", magic, version
PIECE = struct.Struct("<IHB")  # checksum, length, kind
BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    mark, magic, _ = HEADER.unpack_from(content)
    assert (mark, magic) == (b":W&B", 0xBEE1), f"{path} is no W&B file"
    position, whole = HEADER.size, b""
    while position + PIECE.size <= len(content):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < PIECE.size:
            position += left_in_block
            continue
        checksum, length, kind = PIECE.unpack_from(content, position)
        position += PIECE.size
        piece = content[position : position + length]
        position += length
        if kind == 0:  # zeros up to the end of the block
            continue
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum, f"{path} is damaged at byte {position}"
        whole = piece if kind in (WHOLE, FIRST) else whole + piece
        if kind in (WHOLE, LAST):
            yield whole


@dataclass
class OfflineRun:
    """One session of a W&B run: what it would show after `wandb sync`."""

    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)  # of each metric name or glob
    alerts: list[tuple[str, str, str]] = field(default_factory=list)  # title, text, level
    preempting: bool = False
    exit_code: int | None = None


def key_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def read(folder: Path) -> OfflineRun:
    """`folder`: `wandb/offline-run-…`."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    run = OfflineRun()
    for payload in payloads(path):
        record = Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name, run.project = record.run.run_id, record.run.display_name, record.run.project
            run.group, run.tags = record.run.run_group, list(record.run.tags)
            run.config |= {key_of(item): json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run.config |= {key_of(item): json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            run.history.append({key_of(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run.summary |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            run.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "alert":
            run.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "preempting":
            run.preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run
