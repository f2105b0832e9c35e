"""Decodes through attention.c: fp32 on a CPU, keys and values read in their pages, codes too.

Gathering pages for torch's attention reads and writes every key once more and takes a dozen calls a layer; with one
sequence the calls are most of the time.

Shape suffixes: T tokens, H query heads, D head width, P pages of a table, N decodes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from compress.core.compiling import threads_for
from runtime.native.kv_store import KVPages, described, reads
from runtime.native.library import library
from runtime.ops.pages import Pages


class _Decodes(ctypes.Structure):
    """The struct `decodes` of operations.h; pointers are plain numbers."""

    _fields_ = [
        ("k", KVPages),
        ("v", KVPages),
        ("k_coded", KVPages),
        ("v_coded", KVPages),
        *((name, ctypes.c_size_t) for name in ("q", "out", "table", "line", "row", "first", "end", "coded")),
        *((name, ctypes.c_int64) for name in ("sequences", "table_stride", "q_stride")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "width", "sinks")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Decodes:
    """Sequences with one query each: its row in the batch, the slots first … end - 1 that it sees, its pages: a line of
    a table, the first ones in turn where none is named."""

    row_N: torch.Tensor  # int64
    first_N: torch.Tensor  # int32
    end_N: torch.Tensor  # int32
    table_NP: torch.Tensor  # int32
    slots: int  # seen by all of them
    coded_N: torch.Tensor | None = None  # int32, of AttentionBatch
    sinks: int = 0
    line_N: torch.Tensor | None = None  # int64


def takes(q_THD: torch.Tensor, *pages: Pages) -> bool:
    """Whether the kernel does these CPU tensors (fp32 queries, fp32 or coded pages) and could be compiled."""
    return q_THD.dtype == torch.float32 and all(map(reads, pages)) and library().loaded is not None


def decode(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    part: Decodes,
    scale: float,
    softcap: float | None,
) -> None:
    """Write the decodes' rows of `out_THD` (contiguous)."""
    heads, width = q_THD.shape[1:]
    if q_THD.stride()[1:] != (width, 1):
        q_THD = q_THD.contiguous()
    groups = k.groups
    coded, line = (0 if x is None else x.data_ptr() for x in (part.coded_N, part.line_N))
    work = _Decodes(
        _paged(k), _paged(v), described(k.coded), described(v.coded), q_THD.data_ptr(), out_THD.data_ptr(),
        part.table_NP.data_ptr(), line, part.row_N.data_ptr(), part.first_N.data_ptr(), part.end_N.data_ptr(), coded,
        len(part.row_N), part.table_NP.shape[1], q_THD.stride(0), heads, groups, width, part.sinks,
        scale, softcap or 0.0,
    )  # fmt: skip
    if library().loaded.paged_decode(ctypes.byref(work), threads_for(part.slots * groups * width)):
        raise MemoryError(f"no memory for attention of {len(part.row_N)} decodes")


def _paged(pages: Pages) -> KVPages:
    """What C sees, where a page need not be as long as memory says (runtime.ops.head_pages)."""
    found = described(pages)
    found.tokens, found.slot_rows = pages.block, pages.slot_rows
    return found
