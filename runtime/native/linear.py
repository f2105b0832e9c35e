"""Products of fp32 inputs with packed and dense weights through low_bit.c, int16.c and dense.c.

torch's packed kernels want bf16 inputs, which only some CPUs are good at, know few schemes, and lose to dense weights
from a dozen rows on. These read a QuantTensor as it lies, for every scheme; and dense weights as they are stored, bf16
ones too, for which torch would need fp32 copies.

Shape suffixes: M rows, K input channels, O output channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from compress.core.compiling import threads_for
from runtime.native.library import library

KINDS = {"int": 0, "nf4": 1, "fp4": 1, "mxfp4": 1, "nvfp4": 1, "fp8": 2}
DENSE_KINDS = {torch.float32: 3, torch.bfloat16: 4}
LEAST_CHANNELS = 4
DENSE_STEP = 16  # dense weights are read so many at once


class Weight(ctypes.Structure):
    """The struct `weight` of linear.h; pointers are plain numbers, so that it can be copied."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("codes", "scale", "zero", "table", "map", "start")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "row_bytes", "groups", "group_bytes")),
        ("middle", ctypes.c_float),
        ("bits", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    ]


def takes_dense(weight_OK: Tensor) -> bool:
    """Whether the kernels do this weight and could be compiled."""
    rows, width = weight_OK.shape
    plain = weight_OK.device.type == "cpu" and weight_OK.dtype in DENSE_KINDS and weight_OK.is_contiguous()
    return plain and rows >= LEAST_CHANNELS and width % DENSE_STEP == 0 and library().loaded is not None


def dense_weight(weight_OK: Tensor) -> Weight:
    """A weight that `takes_dense` accepts, as the kernels see it: valid as long as the tensor is."""
    rows, width = weight_OK.shape
    return Weight(
        codes=weight_OK.data_ptr(),
        rows=rows,
        width=width,
        row_bytes=width * weight_OK.element_size(),
        kind=DENSE_KINDS[weight_OK.dtype],
    )


def product(weight: Weight, x_MK: Tensor) -> Tensor:
    """x Wᵀ, fp32 [M, O], of fp32 x [M, K]."""
    return product_by(library().loaded.linear_product, weight, x_MK)


def product_by(kernel: Callable[..., int], weight: Weight, x_MK: Tensor) -> Tensor:
    """x Wᵀ, fp32 [M, O], by a compiled kernel, which says what it takes."""
    x_MK = x_MK.contiguous()
    y_MO = torch.empty((len(x_MK), weight.rows), dtype=torch.float32)
    threads = threads_for(weight.rows * weight.row_bytes)
    if kernel(ctypes.byref(weight), len(x_MK), x_MK.data_ptr(), y_MO.data_ptr(), threads):
        raise MemoryError(f"no memory for {len(x_MK)} rows of inputs")
    return y_MO


def dequantize(weight: Weight, first: int, last: int, to: Tensor) -> None:
    """Output channels `first` up to `last` into fp32 `to` [last - first, places in a byte, bytes of a channel]."""
    threads = threads_for((last - first) * weight.row_bytes)
    library().loaded.low_bit_dequantize(ctypes.byref(weight), first, last, to.data_ptr(), threads)
