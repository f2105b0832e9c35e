"""Storing keys and values through kv_store.c, and pages as C sees them.

Shape suffixes: T tokens, G key-value heads, D channels of a head.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from runtime.native.library import library
from runtime.ops.coded_pages import CodedPages

if TYPE_CHECKING:
    from runtime.ops.pages import Pages

_CODINGS = {"full": 0, "int8": 1, "int4": 2, "fp8": 3}
_CHANNELS = {"int8": 4, "int4": 5}


class KVPages(ctypes.Structure):
    """The struct `kv_pages` of kv_codes.h; pointers are plain numbers."""

    _fields_ = [
        ("codes", ctypes.c_size_t),
        ("numbers", ctypes.c_size_t),
        ("scale", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("coding", "tokens", "slot_rows", "bytes_apart", "numbers_apart")),
    ]


def reads(pages: Pages | CodedPages) -> bool:
    """Whether C reads these pages: on a CPU, each contiguous, of codes or of fp32."""
    if pages.codec == "full" and pages.codes.dtype != torch.float32:
        return False
    coded = getattr(pages, "coded", None)
    whole = all(x.device.type == "cpu" and x[0].is_contiguous() for x in pages.tensors())
    whole = whole and (pages.scale_G is None or pages.scale_G.is_contiguous())
    return whole and (coded is None or reads(coded))


def takes(x_TGD: torch.Tensor, pages: Pages) -> bool:
    """Whether the kernel codes these numbers (fp32) and could be compiled; numbers that stay need no kernel."""
    plain = (pages.is_coded or pages.coded is not None) and x_TGD.dtype == torch.float32
    return plain and reads(pages) and library().loaded is not None


def described(pages: Pages | CodedPages | None) -> KVPages:
    """What C sees, valid as long as the tensors stay where they are."""
    if pages is None:
        return KVPages()
    numbers, scale = (0 if x is None else x.data_ptr() for x in (pages.numbers, pages.scale_G))
    codings = _CHANNELS if isinstance(pages, CodedPages) and pages.channels else _CODINGS
    return KVPages(
        pages.codes.data_ptr(), numbers, scale, codings[pages.codec], pages.codes.shape[1], pages.codes.shape[2],
        pages.codes.stride(0) * pages.codes.itemsize, 0 if pages.numbers is None else pages.numbers.stride(0),
    )  # fmt: skip


def store(x_TGD: torch.Tensor, pages: Pages, slot_T: torch.Tensor) -> None:
    """Write numbers that `takes` accepts into slots."""
    tokens, groups, width = x_TGD.shape
    if x_TGD.stride()[1:] != (width, 1):
        x_TGD = x_TGD.contiguous()
    library().loaded.kv_store(
        ctypes.byref(described(pages)), x_TGD.data_ptr(), x_TGD.stride(0), slot_T.contiguous().data_ptr(),
        tokens, groups, width,
    )  # fmt: skip
