"""Dense weights: in the dtype that the model computes in, or kept in bf16 beside fp32 inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.layers.base import LinearLayer
from runtime.layers.native import BF16_STEP, LEAST_CHANNELS, kernels

_MANY_ROWS = 32  # from here on BLAS is as fast on fp32 tiles
_TILE_WEIGHTS = 1 << 20
_FEW_WEIGHTS = 1 << 14  # torch's call is shorter than ours


class DenseLinear(LinearLayer):
    """What nn.Linear does, without gradients."""

    weight: Tensor

    def __init__(self, weight_OK: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        self.register_buffer("weight", weight_OK.to(dtype))

    def product(self, x_MK: Tensor) -> Tensor:
        return functional.linear(x_MK.to(self.weight.dtype), self.weight)


def fits_bf16_kernel(weight_OK: Tensor) -> bool:
    """Whether `CompiledDense` takes this weight and is worth it: a CPU tensor in bf16, and kernels that compiled."""
    rows, width = weight_OK.shape
    fits = weight_OK.dtype is torch.bfloat16 and weight_OK.device.type == "cpu" and width % BF16_STEP == 0
    return fits and rows >= LEAST_CHANNELS and weight_OK.numel() >= _FEW_WEIGHTS and kernels().library is not None


class CompiledDense(LinearLayer):
    """A bf16 weight as it is stored, maybe mapped from its file, with fp32 inputs and sums.

    Few rows go through the compiled kernel, which reads half the bytes that fp32 weights have. For more rows, tiles of
    output channels are widened and multiplied by BLAS.
    """

    weight: Tensor

    def __init__(self, weight_OK: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        self.register_buffer("weight", weight_OK.contiguous())

    def product(self, x_MK: Tensor) -> Tensor:
        if len(x_MK) < _MANY_ROWS:
            return kernels().bf16_product(self.weight, x_MK.float())
        y_MO = torch.empty(len(x_MK), self.out_features)
        count = max(1, _TILE_WEIGHTS // self.in_features)
        tile_OK = torch.empty(min(count, self.out_features), self.in_features)
        for first in range(0, self.out_features, count):
            rows_OK = self.weight[first : first + count]
            wide_OK = tile_OK[: len(rows_OK)].copy_(rows_OK)
            torch.mm(x_MK.float(), wide_OK.T, out=y_MO[:, first : first + count])
        return y_MO
