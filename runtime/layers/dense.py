"""A dense weight in the dtype that the model computes in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.layers.base import LinearLayer


class DenseLinear(LinearLayer):
    """What nn.Linear does, without gradients."""

    weight: Tensor

    def __init__(self, weight_OK: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        self.register_buffer("weight", weight_OK.to(dtype))

    def product(self, x_MK: Tensor) -> Tensor:
        return functional.linear(x_MK.to(self.weight.dtype), self.weight)
