"""The only reader of safetensors files: headers checked to the byte, tensors mapped from the file instead of copied.

Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, tensor bytes without gaps).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.lazy import lazy_module
from compress.core.safetensors_layout import ITEM_BYTES, TORCH_NAMES

torch = lazy_module("torch")

HEADER_LIMIT_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `end` of `file`, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file by name, in the order of their bytes. Any contradiction raises InputError."""
    path = Path(path)
    entries, data_start, size = _read_json(path)
    entries.pop("__metadata__", None)
    infos = sorted((_info(path, name, entry, data_start) for name, entry in entries.items()), key=lambda i: i.start)
    position = data_start
    for info in infos:
        if info.start != position:
            kind = "overlaps" if info.start < position else "leaves a gap after"
            raise InputError(f"tensor {info.name!r} {kind} the bytes before it", where=str(path))
        position = info.end
    if position != size:
        kind = "is truncated" if position > size else "has bytes that belong to no tensor"
        raise InputError(f"the file {kind}: its header promises {position} bytes, it has {size}", where=str(path))
    return {info.name: info for info in infos}


def read_metadata(path: Path) -> dict[str, str]:
    """The free-text `__metadata__` of a file."""
    metadata = _read_json(Path(path))[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("the header's __metadata__ is not a map of strings", where=str(path))
    return metadata


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the tensors begin, file size)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError("the file is truncated within its header", where=str(path))
            if length > HEADER_LIMIT_BYTES:
                raise InputError(f"the header claims {length} bytes, over the limit of 100 MB", where=str(path))
            text = file.read(length)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError("the header is not JSON: this is no safetensors file", where=str(path)) from error
    if not isinstance(header, dict):
        raise InputError("the header is not a JSON object", where=str(path))
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"the header names {key!r} twice", where=str(path))
        found[key] = value
    return found


def _info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"the header's entry of tensor {name!r} is malformed", where=str(path)) from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"tensor {name!r} has unknown dtype {dtype!r}", where=str(path))
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise InputError(f"tensor {name!r} has a shape or offset that is no whole number", where=str(path))
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InputError(
            f"tensor {name!r} of {dtype} {list(shape)} does not fit in its {end - start} bytes", where=str(path)
        )
    return TensorInfo(name, dtype, shape, path, data_start + start, data_start + end)


def torch_dtype(dtype: str) -> Any:
    """torch's dtype of a safetensors dtype name."""
    return getattr(torch, TORCH_NAMES[dtype])


def load_tensor(info: TensorInfo) -> Any:
    """The tensor as stored, mapped privately: its pages are file-backed and leave with the tensor."""
    dtype = torch_dtype(info.dtype)
    if info.bytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    if info.start % dtype.itemsize:  # legal, though no writer of today leaves data unaligned
        return torch.frombuffer(bytearray(raw_bytes(info)), dtype=dtype).view(info.shape)
    mapped = torch.from_file(str(info.file), shared=False, size=info.end, dtype=torch.uint8)
    return mapped[info.start : info.end].view(dtype).view(info.shape)


def load_rows(info: TensorInfo, row_ids: Any) -> Any:
    """Rows `row_ids` (1-D integers) of a matrix, in that order; only the pages that hold them are read."""
    return load_tensor(info)[row_ids]


def raw_bytes(info: TensorInfo) -> memoryview:
    """The tensor's bytes as they lie in the file, read-only and mapped."""
    if info.bytes == 0:
        return memoryview(b"")
    with info.file.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[info.start : info.end]


class MappedFiles:
    """Files mapped whole, each once: for whoever looks at many tensors of a file. For one thread at a time.

    The mappings are private (what is done to a tensor never reaches a file) and end with the last tensor of them.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def whole(self, path: Path) -> mmap.mmap:
        """All bytes of a file that is not empty."""
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]

    def bytes(self, info: TensorInfo) -> memoryview:
        """As `raw_bytes`."""
        return memoryview(self.whole(info.file))[info.start : info.end] if info.bytes else memoryview(b"")

    def tensor(self, info: TensorInfo) -> Any:
        """As `load_tensor`."""
        dtype = torch_dtype(info.dtype)
        if info.bytes == 0 or info.start % dtype.itemsize:
            return load_tensor(info)
        count = math.prod(info.shape)
        return torch.frombuffer(self.whole(info.file), dtype=dtype, count=count, offset=info.start).view(info.shape)
