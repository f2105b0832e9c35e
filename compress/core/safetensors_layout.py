"""The layout of a safetensors file, computed before a byte is written: which tensor lies where, and the header.

Format: https://github.com/huggingface/safetensors#format. Nothing here reads or writes:
`files.write_safetensors` writes, `safetensors_io` reads.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32", "U32": "uint32",
    "BF16": "bfloat16", "F16": "float16", "I16": "int16", "U16": "uint16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_FILE_NAMES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written: its place in the header is known now, its bytes are asked for when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], memoryview]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """Entry of a torch tensor on any device."""
    dtype = dtype_name(tensor.dtype)
    return Entry(name, dtype, tuple(tensor.shape), lambda: tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values in C order, without a copy where it lies so already on the CPU."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def dtype_name(dtype: object) -> str:
    """The file's name of a torch dtype, e.g. BF16."""
    if str(dtype) not in _FILE_NAMES:
        raise UsageError(f"a safetensors file cannot hold {dtype}")
    return _FILE_NAMES[str(dtype)]


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """The order on disk: widest items first, so that every tensor is aligned to its item size, then by name."""
    return sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length field and header of a file that holds `entries` in this order; a multiple of 8 bytes."""
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(sorted(metadata.items()))
    start = 0
    for entry in entries:
        if entry.name in table:
            raise UsageError(f"tensor {entry.name!r} is given twice")
        end = start + entry.bytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Exact size of the file that holds `entries`."""
    placed = ordered(entries)
    return len(header(placed, metadata)) + sum(entry.bytes for entry in placed)
