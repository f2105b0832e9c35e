"""Linear layers that keep a QuantTensor as it is, and dequantize a few output channels at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from compress.core.rounded_inputs import rounded_inputs
from compress.core.tensors import QuantTensor
from runtime.layers.base import LinearLayer, tile_channels


class PackedLinear(LinearLayer):
    """Holds the parts of a QuantTensor as buffers."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    divisor: Tensor | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None, slow_reason: str = "") -> None:
        super().__init__(weight.shape, bias, slow_reason, weight.input_scale)
        self.scheme = weight.scheme
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("divisor", weight.divisor)

    @property
    def weight(self) -> QuantTensor:
        """The weight as it is kept."""
        return QuantTensor(
            self.packed,
            self.scale,
            self.zero,
            self.scheme,
            (self.out_features, self.in_features),
            input_scale=self.input_scale,
            divisor=self.divisor,
        )

    def dequantized_tiles(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight [O, K] in `dtype`, some output channels at a time; the tiles depend on the shape alone."""
        weight = self.weight
        count = tile_channels(self.in_features)
        for start in range(0, self.out_features, count):
            yield weight.rows(start, start + count).dequantize(dtype)


class DequantizingLinear(PackedLinear):
    """Dequantizes the whole weight, tile by tile, at each forward: right for every scheme, and slow for few rows."""

    def product(self, x_MK: Tensor) -> Tensor:
        x_MK = rounded_inputs(x_MK.float(), self.scheme, self.input_scale).to(x_MK.dtype)
        return torch.cat([functional.linear(x_MK, tile_OK) for tile_OK in self.dequantized_tiles(x_MK.dtype)], dim=1)
