"""Low-bit weights through the compiled kernels of `native`: any scheme, kept as it is packed, fp32 sums.

Few rows go through the kernel, which reads the codes once for up to four of them; where the CPU has AVX2 it takes
inputs as whole numbers of 16 bits with a scale for each block of them, which is closer to them than bf16. For more
rows, tiles of output channels are dequantized and multiplied by BLAS, as a dense layer is; benchmarks/low_bit_linear.py
shows where the two meet. 8-bit inputs are rounded as the format says.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from compress.core.levels import table
from compress.core.rounded_inputs import rounded_inputs
from compress.core.scheme import OWN_GROUPS, Scheme
from compress.core.tensors import QuantTensor, pack_rows
from runtime.layers.base import LinearLayer, product_by_tiles
from runtime.native.library import library
from runtime.native.linear import KINDS, LEAST_CHANNELS, Weight, dequantize, product

_MANY_ROWS = 64  # from here on BLAS is faster, for integers in groups of
_LARGE_GROUP_BYTES = 64
_MANY_ROWS_OTHERWISE = 24
_BLOCK_BYTES = 8


def fits_kernels(weight: QuantTensor) -> bool:
    """Whether groups are whole blocks, there are enough output channels, and the kernels could be compiled."""
    size = weight.scheme.group_size
    whole = size == -1 or size * _kept_bits(weight) % (8 * _BLOCK_BYTES) == 0
    return whole and weight.shape[0] >= LEAST_CHANNELS and library().loaded is not None


class CompiledLinear(LinearLayer):
    """Codes of 3 bits are kept in 4 and those of 5 to 7 in 8; scales are kept in fp32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, input_scale=weight.input_scale)
        self.scheme, self.bits = weight.scheme, _kept_bits(weight)
        packed = weight.packed if self.bits == weight.scheme.bits else pack_rows(weight.stored(), self.bits)
        codes = packed.contiguous().view(torch.uint8)
        self.register_buffer("codes", functional.pad(codes, (0, -codes.shape[1] % _BLOCK_BYTES)))
        self.register_buffer("scale", weight.unit.mul(_range_of(self.scheme)).contiguous())
        unsigned = None if weight.zero is None else (weight.zero.to(torch.int16) - self.scheme.lowest).to(torch.uint8)
        self.register_buffer("zero", unsigned)
        floating = KINDS[self.scheme.dtype] == KINDS["nf4"]
        self.register_buffer("table", table(self.scheme.dtype) / _range_of(self.scheme) if floating else None)
        self._described = self._description()

    @property
    def many_rows(self) -> int:
        large = self._described.group_bytes >= _LARGE_GROUP_BYTES
        return _MANY_ROWS if large and self.scheme.dtype == "int" else _MANY_ROWS_OTHERWISE

    def product(self, x_MK: Tensor) -> Tensor:
        rounded_MK = rounded_inputs(x_MK.float(), self.scheme, self.input_scale)
        if len(x_MK) < self.many_rows:
            return product(self._current(), rounded_MK)
        return self._many_rows(rounded_MK.to(x_MK.dtype))

    def for_kernels(self) -> Weight | None:
        return self._current() if self.scheme.activation_bits == 16 else None

    def _many_rows(self, x_MK: Tensor) -> Tensor:
        """Inputs are arranged as the kernel arranges weights: by their place in a byte."""
        places, row_bytes = 8 // self.bits, self.codes.shape[1]
        padded_MK = functional.pad(x_MK, (0, row_bytes * places - self.in_features))
        arranged_MK = padded_MK.view(-1, row_bytes, places).transpose(1, 2).reshape(padded_MK.shape)
        return product_by_tiles(arranged_MK, self.out_features, partial(dequantize, self._current()))

    def _description(self) -> Weight:
        """What the kernels need to know, pointers apart."""
        size, row_bytes = self.scheme.group_size, self.codes.shape[1]
        return Weight(
            rows=self.out_features,
            width=self.in_features,
            row_bytes=row_bytes,
            groups=self.scale.shape[1],
            group_bytes=row_bytes if size == -1 else size * self.bits // 8,
            middle=-self.scheme.lowest if self.scheme.dtype == "int" else 0,
            bits=self.bits,
            kind=KINDS[self.scheme.dtype],
        )

    def _current(self) -> Weight:
        """The description with pointers to where the buffers are now."""
        weight = self._described
        weight.codes, weight.scale = self.codes.data_ptr(), self.scale.data_ptr()
        weight.zero = 0 if self.zero is None else self.zero.data_ptr()
        weight.table = 0 if self.table is None else self.table.data_ptr()
        return weight


def _range_of(scheme: Scheme) -> float:
    """A power of two that levels are divided by, for the kernels want tables within [-1, 1]."""
    return 8.0 if scheme.dtype in OWN_GROUPS else 1.0


def _kept_bits(weight: QuantTensor) -> int:
    return next(bits for bits in (2, 4, 8) if bits >= weight.scheme.bits)
