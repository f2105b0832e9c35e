"""What all linear layers of the runtime share: leading dimensions, the bias, the count of bytes.

Shape suffixes: M rows of a batch, K input channels, O output channels, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from runtime.native.linear import Weight

if TYPE_CHECKING:
    from runtime.layers.sparse import Packing

_TILE_WEIGHTS = 1 << 20  # weights that are dense at a time


class LinearLayer(nn.Module):
    """y = x Wᵀ + b for x [..., K] in a floating-point dtype; y [..., O] has the dtype of x.

    A subclass holds the weight as buffers and gives `product`. `input_scale` fp32 [1] is that of static inputs.
    `slow_reason` says why a layer has no fast path on this device; it is empty if it has one. `many_rows`: from so many
    rows on, it is faster not to go through the kernels of runtime.native. `packing` says what became of a layer with
    zeros, in models that have them by choice.
    """

    bias: Tensor | None
    input_scale: Tensor | None
    many_rows: int = 0
    packing: Packing | None = None

    def __init__(
        self,
        shape: tuple[int, int],
        bias: Tensor | None,
        slow_reason: str = "",
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.slow_reason = slow_reason
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that the layer keeps."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        y_MO = self.product(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y_MO = y_MO + self.bias
        return y_MO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, x_MK: Tensor) -> Tensor:
        """x Wᵀ [M, O], in the dtype of x or a wider one."""
        raise NotImplementedError

    def for_kernels(self) -> Weight | None:
        """The weight as the kernels of runtime.native take it, valid as long as the layer stays where it is, if they
        do all that `product` does."""
        return None

    def extra_repr(self) -> str:
        reason = f", slow: {self.slow_reason}" if self.slow_reason else ""
        return f"{self.in_features} -> {self.out_features}, {self.bytes} bytes{reason}"


def product_by_tiles(x_MK: Tensor, channels: int, fill: Callable[[int, int, Tensor], object]) -> Tensor:
    """x Wᵀ [M, O] through BLAS, in the dtype of x, some output channels at a time.

    `fill(first, last, to)` puts those of W into fp32 `to` [last - first, K].
    """
    width = x_MK.shape[1]
    count = tile_channels(width)
    tile_OK = torch.empty(min(count, channels), width)
    y_MO = x_MK.new_empty(len(x_MK), channels)
    for first in range(0, channels, count):
        last = min(first + count, channels)
        fill(first, last, tile_OK[: last - first])
        torch.mm(x_MK, tile_OK[: last - first].to(x_MK.dtype).T, out=y_MO[:, first:last])
    return y_MO


def tile_channels(width: int) -> int:
    """Output channels of so many weights that are dense at a time."""
    return max(1, _TILE_WEIGHTS // width)


def pad_rows(x_MK: Tensor, multiple: int) -> Tensor:
    """The rows and as many of zeros as make their number a multiple."""
    missing = -len(x_MK) % multiple
    return torch.nn.functional.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK
