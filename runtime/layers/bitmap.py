"""Weights that are mostly zero on a CPU: a map of bits and the bf16 numbers that are left, with fp32 inputs and sums.

Few rows go through the kernel of `native`, which reads half a dense weight's bytes at 2:4 and less where more is zero.
For more rows, tiles of output channels become dense and are multiplied by BLAS. benchmarks/sparse_linear.py shows where
the two meet, and where neither is worth it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.layers.base import LinearLayer, product_by_tiles
from runtime.native.bitmap import Bitmap, described, expand, pack
from runtime.native.linear import Weight, product

_MANY_ROWS = {torch.float32: 32, torch.bfloat16: 8}  # by the dtype of inputs: from here on BLAS is faster on tiles


class BitmapLinear(LinearLayer):
    """A bf16 weight that `takes_zeros` accepts, for inputs in `dtype`."""

    map: Tensor
    values: Tensor
    start: Tensor

    def __init__(self, weight_OK: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        packed = pack(weight_OK)
        self.register_buffer("map", packed.map_OB)
        self.register_buffer("values", packed.values_N)
        self.register_buffer("start", packed.start_O)
        self.many_rows = _MANY_ROWS.get(dtype, _MANY_ROWS[torch.float32])

    def product(self, x_MK: Tensor) -> Tensor:
        if len(x_MK) < self.many_rows:
            return product(self.for_kernels(), x_MK.float())
        return product_by_tiles(x_MK, self.out_features, self._spread, torch.bfloat16)

    def for_kernels(self) -> Weight:
        return described(Bitmap(self.map, self.values, self.start))

    def _spread(self, first: int, last: int, to: Tensor) -> None:
        expand(self.for_kernels(), first, last, to)
