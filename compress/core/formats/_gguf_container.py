"""The container of GGUF, version 3: header, metadata, tensor table; laid out before a byte is written, and read back.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian. Shapes are as everywhere else here,
slowest dimension first; in the file they lie the other way round.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import ArtifactError, UsageError
from compress.core.formats._gguf_types import TYPES, BlockType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_U32, _I32, _F32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9
_LIMIT = 1 << 32  # entries, characters and dimensions beyond this are no model


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value with its type in the file; `item` is that of an array's elements."""

    kind: int
    value: Any
    item: int = 0


def u32(value: int) -> Value:
    """A whole number of 32 bits."""
    return Value(_U32, value)


def f32(value: float) -> Value:
    """A float."""
    return Value(_F32, value)


def flag(value: bool) -> Value:
    """True or false."""
    return Value(_BOOL, value)


def text(value: str) -> Value:
    """A string."""
    return Value(_TEXT, value)


def texts(values: Sequence[str]) -> Value:
    """A list of strings."""
    return Value(_ARRAY, values, _TEXT)


def i32s(values: Sequence[int]) -> Value:
    """A list of whole numbers."""
    return Value(_ARRAY, values, _I32)


def f32s(values: Sequence[float]) -> Value:
    """A list of floats."""
    return Value(_ARRAY, values, _F32)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written: its place is known now, its bytes are asked for when their turn comes."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    produce: Callable[[], memoryview]

    @property
    def bytes(self) -> int:
        return self.type.bytes_of(self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a file: `start` counted from its beginning."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return self.type.bytes_of(self.shape)


def header(metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> bytes:
    """Everything in front of the tensors' bytes, padded; each tensor follows at the next multiple of ALIGNMENT."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), struct.pack("<I", value.kind), _value(value)]
    start, seen = 0, set()
    for tensor in tensors:
        if tensor.name in seen:
            raise UsageError(f"tensor {tensor.name!r} is given twice")
        seen.add(tensor.name)
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_text(tensor.name), dimensions, struct.pack("<IQ", tensor.type.id, start)]
        start = aligned(start + tensor.bytes)
    data = b"".join(parts)
    return data + bytes(aligned(len(data)) - len(data))


def aligned(position: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def pieces(metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> Iterable[bytes | memoryview]:
    """The whole file, piece by piece; one tensor at a time is in memory."""
    yield header(metadata, tensors)
    for tensor in tensors:
        data = tensor.produce()
        if data.nbytes != tensor.bytes:
            raise ArtifactError(f"tensor {tensor.name!r} has {data.nbytes} bytes where {tensor.bytes} were announced")
        yield data
        yield bytes(aligned(tensor.bytes) - tensor.bytes)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if value.kind == _TEXT:
        return _text(value.value)
    if value.kind != _ARRAY:
        return struct.pack(_SCALARS[value.kind], value.value)
    head = struct.pack("<IQ", value.item, len(value.value))
    if value.item == _TEXT:
        return head + b"".join(map(_text, value.value))
    return head + struct.pack(f"<{len(value.value)}{_SCALARS[value.item][1]}", *value.value)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensors of a file. ArtifactError says what contradicts itself."""
    cursor = _Cursor(path)
    if cursor.take(4) != MAGIC or cursor.number("<I") != VERSION:
        raise ArtifactError(f"is no GGUF file of version {VERSION}", where=str(path))
    tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.checked(entry_count)):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("<I"))
    listed = [_listed(cursor) for _ in range(cursor.checked(tensor_count))]
    start = aligned(cursor.position)
    tensors = {name: Stored(name, kind, shape, start + offset) for name, kind, shape, offset in listed}
    if len(tensors) != len(listed):
        raise ArtifactError("names a tensor twice", where=str(path))
    for tensor in tensors.values():
        if tensor.start % ALIGNMENT or tensor.start + tensor.bytes > cursor.size:
            raise ArtifactError(f"tensor {tensor.name!r} does not lie within the file", where=str(path))
    return metadata, tensors


def _listed(cursor: _Cursor) -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.text()
    sizes = [cursor.number("<Q") for _ in range(cursor.checked(cursor.number("<I"), 4))]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if kind not in TYPES or math.prod(sizes) >= _LIMIT * _LIMIT or (sizes and sizes[0] % TYPES[kind].weights):
        raise ArtifactError(f"tensor {name!r} of type {kind} and {sizes} cannot be read", where=str(cursor.path))
    return name, TYPES[kind], tuple(reversed(sizes)), offset


class _Cursor:
    """Reads a file from its beginning on; what lies beyond its end is an ArtifactError."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.position = path, path.stat().st_size, 0
        self._stream = path.open("rb")

    def take(self, count: int) -> bytes:
        data = self._stream.read(count) if count <= self.size - self.position else b""
        if len(data) != count:
            raise ArtifactError("ends within its header", where=str(self.path))
        self.position += count
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def checked(self, count: int, limit: int | None = None) -> int:
        if count > (self.size if limit is None else limit):
            raise ArtifactError(f"claims {count} entries, more than it can hold", where=str(self.path))
        return count

    def text(self) -> str:
        data = self.take(self.number("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ArtifactError("holds a name that is not UTF-8", where=str(self.path)) from None

    def value(self, kind: int, *, inside: bool = False) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY and not inside:
            item, count = self.number("<I"), self.number("<Q")
            return [self.value(item, inside=True) for _ in range(self.checked(count))]
        if kind not in _SCALARS:
            raise ArtifactError(f"holds metadata of unknown type {kind}", where=str(self.path))
        return self.number(_SCALARS[kind])
