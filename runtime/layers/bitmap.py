"""Weights that are mostly zero on a CPU: a map of bits and the bf16 numbers that are left. Sums are fp32.

Few rows go through the kernels of `native`, which read 9/16 of a dense weight's bytes at 2:4 and less where more is
zero: with fp32 inputs, or with bf16 ones in the tiles of AMX. For more rows, some output channels at a time become
dense and are multiplied by BLAS. benchmarks/sparse_linear.py has the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.layers.base import LinearLayer
from runtime.native.bitmap import Bitmap, described, expand, pack, takes_tiles, tiles_product
from runtime.native.linear import Weight, product

_MANY_ROWS = 32  # from here on BLAS is faster than the kernel for fp32 inputs,
_MANY_SHORT_ROWS = 8  # also with bf16 ones,
_MANY_TILE_ROWS = 129  # and than AMX on what was spread out for so many at a time
_SPREAD_WEIGHTS = {torch.float32: 1 << 20, torch.bfloat16: 1 << 22}  # that are dense at a time, by dtype


class BitmapLinear(LinearLayer):
    """A bf16 weight that `takes_zeros` accepts."""

    map: Tensor
    values: Tensor
    start: Tensor

    many_rows = _MANY_ROWS

    def __init__(self, weight_OK: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        packed = pack(weight_OK)
        self.register_buffer("map", packed.map_OB)
        self.register_buffer("values", packed.values_N)
        self.register_buffer("start", packed.start_O)
        self._in_tiles = takes_tiles(packed)

    def product(self, x_MK: Tensor) -> Tensor:
        rows, short = len(x_MK), x_MK.dtype is torch.bfloat16
        if short and self._in_tiles and rows < _MANY_TILE_ROWS:
            return tiles_product(self.for_kernels(), x_MK)
        if rows < (_MANY_SHORT_ROWS if short else _MANY_ROWS):
            return product(self.for_kernels(), x_MK.float())
        return self._many_rows(x_MK)

    def for_kernels(self) -> Weight:
        return described(Bitmap(self.map, self.values, self.start))

    def _many_rows(self, x_MK: Tensor) -> Tensor:
        most_weights = _SPREAD_WEIGHTS.get(x_MK.dtype, 1 << 20)
        weight, count = self.for_kernels(), max(1, most_weights // self.in_features)
        spread_OK = torch.empty(min(count, self.out_features), self.in_features, dtype=torch.bfloat16)
        pieces = []
        for first in range(0, self.out_features, count):
            last = min(first + count, self.out_features)
            expand(weight, first, last, spread_OK)
            pieces.append(functional.linear(x_MK, spread_OK[: last - first].to(x_MK.dtype)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
