"""The library of all C files in this folder."""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compress.core.compiling import load
from compress.core.errors import CompressError

_POINTER, _INTEGER = c_void_p, c_int64
_ARGUMENTS = {
    "paged_decode": [_POINTER, c_int],
    "rms_norm": [*[_POINTER] * 3, *[_INTEGER] * 2, c_float, c_float, c_int],
    "rotary": [*[_POINTER] * 6, *[_INTEGER] * 7, c_int],
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
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = c_int if name == "paged_decode" else None
    return Library(loaded)
