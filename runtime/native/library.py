"""The library of all C files in this folder."""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress.core.compiling import load
from compress.core.errors import CompressError

_POINTER, _INTEGER = c_void_p, c_int64
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # result, arguments
    "bitmap_expand": (None, [_POINTER, _INTEGER, _INTEGER, _POINTER, c_int]),
    "bitmap_map": (None, [_POINTER, *[_INTEGER] * 2, *[_POINTER] * 2, c_int]),
    "bitmap_served": (c_int, []),
    "bitmap_tiles_product": (c_int, [_POINTER, _INTEGER, _POINTER, _POINTER, c_int]),
    "bitmap_tiles_served": (c_int, []),
    "bitmap_values": (None, [_POINTER, *[_INTEGER] * 2, *[_POINTER] * 3, c_int]),
    "decoder_step": (c_int, [_POINTER] * 2),
    "kv_store": (None, [_POINTER, _POINTER, _INTEGER, _POINTER, *[_INTEGER] * 3]),
    "linear_product": (c_int, [_POINTER, _INTEGER, _POINTER, _POINTER, c_int]),
    "low_bit_dequantize": (None, [_POINTER, _INTEGER, _INTEGER, _POINTER, c_int]),
    "paged_decode": (c_int, [_POINTER, c_int]),
    "rms_norm": (None, [*[_POINTER] * 3, *[_INTEGER] * 2, c_float, c_float, c_int]),
    "rotary": (None, [*[_POINTER] * 6, *[_INTEGER] * 7, c_int]),
}


@dataclass(frozen=True)
class Library:
    """The loaded library, or None and the reason."""

    loaded: CDLL | None
    reason: str = ""


@cache
def library() -> Library:
    """Compiled, or taken from the cache, and loaded: once in a process."""
    try:
        loaded = load(Path(__file__).parent)
    except CompressError as error:
        return Library(None, str(error))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return Library(loaded)
