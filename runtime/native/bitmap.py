"""Weights that are mostly zero as a map of bits and the numbers that are left, through bitmap.c.

Shape suffixes: M rows, K input channels, O output channels, B words of 32 numbers of an output channel, N numbers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.compiling import threads_for
from runtime.native.library import library
from runtime.native.linear import LEAST_CHANNELS, Weight, product_by

KIND = 5
STEP = 32  # numbers of a word
TILE_CHANNELS = 16


@dataclass(frozen=True)
class Bitmap:
    """`map_OB` int32: bit i of a word is set where number 32 b + i is other than zero. `values_N` bf16: those numbers,
    and 32 zeros that the kernel may read. `start_O` int64: where the numbers of each output channel begin."""

    map_OB: Tensor
    values_N: Tensor
    start_O: Tensor


def takes_zeros(weight_OK: Tensor) -> bool:
    """Whether the kernels do this weight: bf16 on a CPU with AVX-512 VBMI2, where they could be compiled."""
    rows, width = weight_OK.shape
    plain = weight_OK.device.type == "cpu" and weight_OK.dtype is torch.bfloat16 and weight_OK.is_contiguous()
    fits = plain and rows >= LEAST_CHANNELS and width % STEP == 0
    return fits and library().loaded is not None and bool(library().loaded.bitmap_served())


def pack(weight_OK: Tensor) -> Bitmap:
    """Of a weight that `takes_zeros` accepts."""
    loaded, shape, threads = library().loaded, weight_OK.shape, threads_for(weight_OK.numel())
    map_OB = torch.empty((shape[0], shape[1] // STEP), dtype=torch.int32)
    count_O = torch.empty(shape[0], dtype=torch.int64)
    loaded.bitmap_map(weight_OK.data_ptr(), *shape, map_OB.data_ptr(), count_O.data_ptr(), threads)
    end_O = count_O.cumsum(0)
    start_O = end_O - count_O
    values_N = torch.zeros(int(end_O[-1]) + STEP, dtype=torch.bfloat16)
    at = (map_OB.data_ptr(), start_O.data_ptr(), values_N.data_ptr())
    loaded.bitmap_values(weight_OK.data_ptr(), *shape, *at, threads)
    return Bitmap(map_OB, values_N, start_O)


def described(bitmap: Bitmap) -> Weight:
    """What the kernels see, valid as long as the tensors stay where they are."""
    rows, words = bitmap.map_OB.shape
    return Weight(
        codes=bitmap.values_N.data_ptr(),
        map=bitmap.map_OB.data_ptr(),
        start=bitmap.start_O.data_ptr(),
        rows=rows,
        width=words * STEP,
        row_bytes=2 * (len(bitmap.values_N) - STEP) // rows + 4 * words,
        kind=KIND,
    )


def has_tiles() -> bool:
    """Whether this CPU has AMX."""
    return library().loaded is not None and bool(library().loaded.bitmap_tiles_served())


def takes_tiles(bitmap: Bitmap) -> bool:
    """Whether `tiles_product` does this weight."""
    return len(bitmap.start_O) >= TILE_CHANNELS and has_tiles()


def tiles_product(weight: Weight, x_MK: Tensor) -> Tensor:
    """x Wᵀ, fp32 [M, O], of bf16 x [M, K]."""
    return product_by(library().loaded.bitmap_tiles_product, weight, x_MK)


def expand(weight: Weight, first: int, last: int, to: Tensor) -> None:
    """Output channels `first` up to `last` into bf16 `to` [last - first, K]."""
    threads = threads_for((last - first) * weight.row_bytes)
    library().loaded.bitmap_expand(ctypes.byref(weight), first, last, to.data_ptr(), threads)


def expand_reference(bitmap: Bitmap) -> Tensor:
    """The dense weight bf16 [O, K], in torch alone."""
    bits_OBS = (bitmap.map_OB[:, :, None] >> torch.arange(STEP, dtype=torch.int32)) & 1
    dense_OK = torch.zeros(bits_OBS.shape, dtype=torch.bfloat16).flatten(1)
    dense_OK[bits_OBS.flatten(1).bool()] = bitmap.values_N[:-STEP]
    return dense_OK
