"""Linear layers in fp32 whose rows do not depend on the batch that they come in.

BLAS takes another order of sums for a few rows than for many, and where it changes its mind depends on the processor
and the number of threads. Rows therefore go in tiles of one size, the last one padded, so that the same row gives the
same bits alone, in a batch, and in a chunk of a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.rounded_inputs import rounded_inputs
from compress.core.tensors import QuantTensor
from runtime.layers.base import LinearLayer, pad_rows
from runtime.layers.packed import PackedLinear

ROW_TILE = 16


class ExactDense(LinearLayer):
    """A dense weight, kept in fp32."""

    weight: Tensor

    def __init__(self, weight_OK: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), None if bias is None else bias.float())
        self.register_buffer("weight", weight_OK.float().contiguous())

    def product(self, x_MK: Tensor) -> Tensor:
        return exact_product(x_MK.float(), self.weight)


class ExactPacked(PackedLinear):
    """A quantized weight, dequantized tile by tile of output channels. 8-bit inputs are rounded as the format says."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight, None if bias is None else bias.float())

    def product(self, x_MK: Tensor) -> Tensor:
        x_MK = rounded_inputs(x_MK.float(), self.scheme, self.input_scale)
        tiles = [exact_product(x_MK, tile_OK) for tile_OK in self.dequantized_tiles(torch.float32)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)


def exact_product(x_MK: Tensor, weight_OK: Tensor) -> Tensor:
    """x Wᵀ in fp32, each row with the same bits whatever rows are beside it."""
    padded_MK = pad_rows(x_MK, ROW_TILE)
    y_MO = x_MK.new_empty(len(padded_MK), len(weight_OK))
    for x_TK, y_TO in zip(padded_MK.split(ROW_TILE), y_MO.split(ROW_TILE), strict=True):
        torch.mm(x_TK, weight_OK.T, out=y_TO)
    return y_MO[: len(x_MK)]
