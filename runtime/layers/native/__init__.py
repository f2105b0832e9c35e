"""C kernels for low-bit and bf16 weights on CPUs, compiled by the machine's own gcc when the first layer asks for them.

torch's packed kernels want bf16 inputs, which only some CPUs are good at, know few schemes, and lose to dense weights
from a dozen rows on. These read a QuantTensor as it lies, for every scheme; and bf16 weights with fp32 inputs, for
which torch would need fp32 copies. Where they cannot be compiled, `reason` says why, and layers go through torch's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress.core.compiling import load, threads_for
from compress.core.errors import CompressError

KINDS = {"int": 0, "nf4": 1, "fp4": 1, "fp8": 2}
LEAST_CHANNELS = 4
BF16_STEP = 16  # bf16 weights are read so many at once
_SERIAL_BYTES = 1 << 16  # smaller weights are not worth waking a second thread


class Weight(ctypes.Structure):
    """The struct of the same name in low_bit.c; pointers are plain numbers, so that it can be copied."""

    _fields_ = [
        ("codes", ctypes.c_size_t),
        ("scale", ctypes.c_size_t),
        ("zero", ctypes.c_size_t),
        ("table", ctypes.c_size_t),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_bytes", ctypes.c_int64),
        ("middle", ctypes.c_float),
        ("bits", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels, or None and the reason."""

    library: ctypes.CDLL | None
    reason: str = ""

    def product(self, weight: Weight, x_MK: Tensor) -> Tensor:
        """x Wᵀ, fp32 [M, O], of fp32 x [M, K]."""
        if self.library is None:
            raise RuntimeError(self.reason)
        x_MK = x_MK.contiguous()
        y_MO = torch.empty((len(x_MK), weight.rows), dtype=torch.float32)
        at = ctypes.byref(weight)
        if self.library.int16_product(at, len(x_MK), x_MK.data_ptr(), y_MO.data_ptr(), _threads(weight, weight.rows)):
            raise MemoryError(f"no memory for {len(x_MK)} rows of inputs")
        return y_MO

    def bf16_product(self, weight_OK: Tensor, x_MK: Tensor) -> Tensor:
        """x Wᵀ, fp32 [M, O], of fp32 x [M, K] and contiguous bf16 W [O, K]; K is a multiple of BF16_STEP."""
        if self.library is None:
            raise RuntimeError(self.reason)
        x_MK = x_MK.contiguous()
        y_MO = torch.empty((len(x_MK), len(weight_OK)), dtype=torch.float32)
        if self.library.bf16_product(
            weight_OK.data_ptr(), *weight_OK.shape, len(x_MK), x_MK.data_ptr(), y_MO.data_ptr(),
            threads_for(weight_OK.numel()),
        ):  # fmt: skip
            raise MemoryError(f"no memory for {len(x_MK)} rows of inputs")
        return y_MO

    def dequantize(self, weight: Weight, first: int, last: int, to: Tensor) -> None:
        """Output channels `first` up to `last` into fp32 `to` [last - first, places in a byte, bytes of a channel]."""
        if self.library is None:
            raise RuntimeError(self.reason)
        threads = _threads(weight, last - first)
        self.library.low_bit_dequantize(ctypes.byref(weight), first, last, to.data_ptr(), threads)


def _threads(weight: Weight, rows: int) -> int:
    return 1 if rows * weight.row_bytes < _SERIAL_BYTES else torch.get_num_threads()


@cache
def kernels() -> Kernels:
    """Compile, or take from the cache, and load: once in a process."""
    try:
        return Kernels(_typed(load(Path(__file__).parent)))
    except CompressError as error:
        return Kernels(None, str(error))


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for product in (library.low_bit_product, library.int16_product):
        product.argtypes = [ctypes.POINTER(Weight), integer, pointer, pointer, number]
        product.restype = number
    library.bf16_product.argtypes = [pointer, *[integer] * 3, pointer, pointer, number]
    library.bf16_product.restype = number
    library.low_bit_dequantize.argtypes = [ctypes.POINTER(Weight), integer, integer, pointer, number]
    library.low_bit_dequantize.restype = None
    return library
