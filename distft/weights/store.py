"""Named tensors that are read lazily, range by range, out of safetensors files or memory. No pickle anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distft import heartbeat
from distft.errors import UserMistake

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MOST_INDEX_BYTES = 256 * 1024**2

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of element types in a safetensors header (https://huggingface.co/docs/safetensors)."""


class Weights(Protocol):
    """Tensors by name. Asking for a range of one reads that range and no more."""

    def names(self) -> list[str]:
        """Every name, in a stable order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The stored element type, which `read` returns."""
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Values `start` to `start + length` (None: to the end) of the flattened tensor: 1-D, on the CPU."""
        ...


def num_elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def read_whole(weights: Weights, name: str) -> Tensor:
    """One tensor in its own shape."""
    return weights.read(name).view(weights.shape(name))


class FolderWeights:
    """The safetensors of a model folder: `model.safetensors`, or the files that its index names.

    Opening reads headers only. The safetensors library checks that a header covers its file exactly, so that a
    truncated download is found here and not as wrong numbers later.
    """

    def __init__(self, folder: str | Path, files: Sequence[str] | None = None) -> None:
        """`files`: read these instead of looking for a model, such as `adapter_model.safetensors`.

        Raises:
            UserMistake: no safetensors, a damaged file, or an index that names what is not there.
        """
        self.folder = Path(folder)
        self._slices: dict[str, Any] = {}
        listed: dict[str, str] = {}
        if files is None:
            files, listed = shard_files(self.folder)
        for file in files:
            handle = open_file(self.folder / file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._slices:
                    raise UserMistake(f"{self.folder}: two of its files hold {name}, {file} is one. It is refused.")
                self._slices[name] = handle.get_slice(name)
        if absent := sorted(set(listed) - set(self._slices)):
            raise UserMistake(
                f"{self.folder / INDEX_FILE} promises {len(absent)} tensors that its files lack, the first "
                f"{absent[0]}. The folder is incomplete: fetch it again."
            )

    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slices[name].get_dtype()
        if stored not in DTYPES:
            raise UserMistake(f"{self.folder}: {name} has the element type {stored}, which is not read here.")
        return DTYPES[stored]

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        heartbeat.beat()
        shape = self.shape(name)
        stop = num_elements(shape) if length is None else start + length
        if not 0 <= start <= stop <= num_elements(shape):
            raise IndexError(f"{name} has {num_elements(shape)} values; {start} to {stop} was asked for")
        if not shape:
            return self._slices[name][...].reshape(1)[start:stop]
        pieces = _ranges(self._slices[name], shape, start, stop, ())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _ranges(tensor: Any, shape: tuple[int, ...], start: int, stop: int, row: tuple[int, ...]) -> list[Tensor]:
    """Flat pieces of `tensor[row]`, of shape `shape`, from `start` to `stop`: whole rows as one, broken ones apart."""
    if len(shape) == 1:
        return [tensor[(*row, slice(start, stop))]]
    size = num_elements(shape[1:])
    first, last = (-(-start // size), stop // size) if size else (0, shape[0])  # whole rows: first to last
    if first > last:  # inside a single row
        return _ranges(tensor, shape[1:], start - last * size, stop - last * size, (*row, last))
    pieces: list[Tensor] = []
    if start < first * size:
        pieces += _ranges(tensor, shape[1:], start - (first - 1) * size, size, (*row, first - 1))
    if first < last or start == stop:
        pieces.append(tensor[(*row, slice(first, last))].reshape(-1))
    if last * size < stop:
        pieces += _ranges(tensor, shape[1:], 0, stop - last * size, (*row, last))
    return pieces


def shard_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a model folder, and the index's map from tensor to file (empty without an index).

    Raises:
        UserMistake: there are none, the index cannot be read, or it names a file outside the folder.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / SINGLE_FILE).exists():
            return [SINGLE_FILE], {}
        raise UserMistake(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}.")
    try:
        if index.stat().st_size > MOST_INDEX_BYTES:
            raise UserMistake(f"{index} has {index.stat().st_size:,} bytes, more than any index. It is refused.")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        # The names come from whoever made the folder: one such as ../../secret would be read from anywhere.
        bad = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserMistake(f"{index} is no index of safetensors files ({error!r}): fetch it again.") from None
    if bad:
        raise UserMistake(f"{index} names {bad[0]!r}, which is not a safetensors file of that folder. It is refused.")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise UserMistake(f"{folder} lacks {len(missing)} of its {len(files)} files, as {missing[0]}: fetch it again.")
    return files, weight_map


def open_file(path: Path) -> Any:
    """A safetensors file, its header checked against its size.

    Raises:
        UserMistake: the file is damaged or incomplete.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise UserMistake(f"{path} ({size:,} bytes) is damaged or incomplete: {error}. Fetch it again.") from None


class MemoryWeights:
    """Tensors that are in memory anyway: fresh adapters, tests."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        flat = self.tensors[name].view(-1)
        stop = flat.numel() if length is None else start + length
        if not 0 <= start <= stop <= flat.numel():
            raise IndexError(f"{name} has {flat.numel()} values; {start} to {stop} was asked for")
        return flat[start:stop]


class Overlay:
    """The weights of `over`, and those of `base` under every name that `over` lacks: adapters over a base."""

    def __init__(self, base: Weights, over: Weights) -> None:
        above = over.names()
        self._of = {**dict.fromkeys(base.names(), base), **dict.fromkeys(above, over)}

    def names(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of[name].dtype(name)

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        return self._of[name].read(name, start, length)


class Renamed:
    """`weights` under other names: `stored_name` maps each new name to the old one.

    Two new names may share an old one: a tied weight has an alias, not a copy.
    """

    def __init__(self, weights: Weights, stored_name: Mapping[str, str]) -> None:
        self.weights = weights
        self.stored_name = dict(stored_name)

    def names(self) -> list[str]:
        return list(self.stored_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(self.stored_name[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(self.stored_name[name])

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        return self.weights.read(self.stored_name[name], start, length)
