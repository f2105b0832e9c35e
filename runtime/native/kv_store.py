"""Storing keys and values through kv_store.c, and pages as C sees them.

Shape suffixes: T tokens, G key-value heads, D channels of a head.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from runtime.native.library import library

if TYPE_CHECKING:
    from runtime.ops.pages import Pages

_CODINGS = {"full": 0, "int8": 1, "int4": 2, "fp8": 3}


class KVPages(ctypes.Structure):
    """The struct `kv_pages` of kv_codes.h; pointers are plain numbers."""

    _fields_ = [
        ("codes", ctypes.c_size_t),
        ("numbers", ctypes.c_size_t),
        ("scale", ctypes.c_size_t),
        ("coding", ctypes.c_int64),
    ]


def reads(pages: Pages) -> bool:
    """Whether C reads these pages: contiguous ones on a CPU, of codes or of fp32."""
    plain = pages.coded is None and (pages.is_coded or pages.codes.dtype == torch.float32)
    tensors = [*pages.tensors(), *([] if pages.scale_G is None else [pages.scale_G])]
    return plain and all(x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def takes(x_TGD: torch.Tensor, pages: Pages) -> bool:
    """Whether the kernel codes these numbers (fp32) and could be compiled; numbers that stay need no kernel."""
    plain = pages.is_coded and x_TGD.dtype == torch.float32
    return plain and reads(pages) and library().loaded is not None


def described(pages: Pages) -> KVPages:
    """What C sees, valid as long as the tensors stay where they are."""
    numbers, scale = (0 if x is None else x.data_ptr() for x in (pages.numbers, pages.scale_G))
    return KVPages(pages.codes.data_ptr(), numbers, scale, _CODINGS[pages.codec])


def store(x_TGD: torch.Tensor, pages: Pages, slot_T: torch.Tensor) -> None:
    """Write numbers that `takes` accepts into slots."""
    tokens, groups, width = x_TGD.shape
    if x_TGD.stride()[1:] != (width, 1):
        x_TGD = x_TGD.contiguous()
    library().loaded.kv_store(
        ctypes.byref(described(pages)), x_TGD.data_ptr(), x_TGD.stride(0), slot_T.contiguous().data_ptr(),
        tokens, groups, width,
    )  # fmt: skip
