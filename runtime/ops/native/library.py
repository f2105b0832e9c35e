"""The library of all C files in this folder."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from runtime.ops.native.build import Library, build

_SERIAL_FLOATS = 1 << 16  # work that is not worth waking a second thread
_POINTER, _INTEGER = c_void_p, c_int64
_ARGUMENTS = {
    "paged_decode": [_POINTER, c_int],
    "rms_norm": [*[_POINTER] * 3, *[_INTEGER] * 2, c_float, c_float, c_int],
    "rotary": [*[_POINTER] * 6, *[_INTEGER] * 7, c_int],
}


@cache
def library() -> Library:
    """Compiled and loaded once in a process."""
    made = build(sorted(Path(__file__).parent.glob("*.c")))
    if made.loaded is not None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(made.loaded, name)
            function.argtypes = arguments
            function.restype = c_int if name == "paged_decode" else None
    return made


def threads_for(floats: int) -> int:
    """Threads for an operation that reads this many numbers."""
    return 1 if floats < _SERIAL_FLOATS else torch.get_num_threads()
