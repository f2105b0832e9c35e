"""Decodes through attention.c: fp32 on a CPU, keys and values read in their pages.

Gathering pages for torch's attention reads and writes every key once more and takes a dozen calls a layer; with one
sequence the calls are most of the time.

Shape suffixes: T tokens, H query heads, D head width, P pages, B slots of a page, G key-value heads, N decodes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from runtime.ops.native.build import Library, build

_SERIAL_FLOATS = 1 << 16  # keys that are not worth waking a second thread


class _Decodes(ctypes.Structure):
    """The struct `Decodes` of attention.c; pointers are plain numbers."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("q", "k", "v", "out", "table", "row", "first", "end")),
        *((name, ctypes.c_int64) for name in ("sequences", "table_stride", "q_stride")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "width", "block")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Decodes:
    """Sequences with one query each: its row in the batch, the slots first … end - 1 that it sees, its pages."""

    row_N: torch.Tensor  # int64
    first_N: torch.Tensor  # int32
    end_N: torch.Tensor  # int32
    table_NP: torch.Tensor  # int32
    slots: int  # seen by all of them


def takes(q_THD: torch.Tensor, *pools: torch.Tensor) -> bool:
    """Whether the kernel does these CPU tensors (fp32, contiguous pools) and could be compiled."""
    plain = all(x.dtype == torch.float32 for x in (q_THD, *pools)) and all(pool.is_contiguous() for pool in pools)
    return plain and library().loaded is not None


@cache
def library() -> Library:
    """The compiled kernel; compiled once in a process."""
    made = build(Path(__file__).with_name("attention.c"))
    if made.loaded is not None:
        made.loaded.paged_decode.argtypes = [ctypes.POINTER(_Decodes), ctypes.c_int]
        made.loaded.paged_decode.restype = ctypes.c_int
    return made


def decode(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_PBGD: torch.Tensor,
    v_PBGD: torch.Tensor,
    part: Decodes,
    scale: float,
    softcap: float | None,
) -> None:
    """Write the decodes' rows of `out_THD` (contiguous)."""
    heads, width = q_THD.shape[1:]
    if q_THD.stride()[1:] != (width, 1):
        q_THD = q_THD.contiguous()
    block, groups = k_PBGD.shape[1:3]
    work = _Decodes(
        q=q_THD.data_ptr(),
        k=k_PBGD.data_ptr(),
        v=v_PBGD.data_ptr(),
        out=out_THD.data_ptr(),
        table=part.table_NP.data_ptr(),
        row=part.row_N.data_ptr(),
        first=part.first_N.data_ptr(),
        end=part.end_N.data_ptr(),
        sequences=len(part.row_N),
        table_stride=part.table_NP.shape[1],
        q_stride=q_THD.stride(0),
        heads=heads,
        groups=groups,
        width=width,
        block=block,
        scale=scale,
        softcap=softcap or 0.0,
    )
    threads = 1 if part.slots * groups * width < _SERIAL_FLOATS else torch.get_num_threads()
    kernel = library().loaded
    if kernel is None:
        raise RuntimeError(library().reason)
    if kernel.paged_decode(ctypes.byref(work), threads):
        raise MemoryError(f"no memory for attention of {len(part.row_N)} decodes")
