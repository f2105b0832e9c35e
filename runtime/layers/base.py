"""What all linear layers of the runtime share: leading dimensions, the bias, the count of bytes.

Shape suffixes: M rows of a batch, K input channels, O output channels, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearLayer(nn.Module):
    """y = x Wᵀ + b for x [..., K] in a floating-point dtype; y [..., O] has the dtype of x.

    A subclass holds the weight as buffers and gives `product`. `slow_reason` says why a layer has no fast path on this
    device; it is empty if it has one.
    """

    bias: Tensor | None

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, slow_reason: str = "") -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.slow_reason = slow_reason
        self.register_buffer("bias", bias)

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

    def extra_repr(self) -> str:
        reason = f", slow: {self.slow_reason}" if self.slow_reason else ""
        return f"{self.in_features} -> {self.out_features}, {self.bytes} bytes{reason}"


def pad_rows(x_MK: Tensor, multiple: int) -> Tensor:
    """The rows and as many of zeros as make their number a multiple."""
    missing = -len(x_MK) % multiple
    return torch.nn.functional.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK
