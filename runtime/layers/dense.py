"""Dense weights: in the dtype that the model computes in, or kept in bf16 beside fp32 inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.layers.base import LinearLayer, product_by_tiles
from runtime.native.linear import Weight, dense_weight, product, takes_dense

_MANY_ROWS = 32  # from here on BLAS is as fast on fp32 tiles
_FEW_WEIGHTS = 1 << 14  # torch's call is shorter than ours


class DenseLinear(LinearLayer):
    """What nn.Linear does, without gradients."""

    weight: Tensor
    many_rows = _MANY_ROWS

    def __init__(self, weight_OK: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        self.register_buffer("weight", weight_OK.to(dtype))

    def product(self, x_MK: Tensor) -> Tensor:
        return functional.linear(x_MK.to(self.weight.dtype), self.weight)

    def for_kernels(self) -> Weight | None:
        return dense_weight(self.weight) if takes_dense(self.weight) else None


def fits_bf16_kernel(weight_OK: Tensor) -> bool:
    """Whether `CompiledDense` takes this weight and is worth it: a CPU tensor in bf16, and kernels that compiled."""
    worth_it = weight_OK.dtype is torch.bfloat16 and weight_OK.numel() >= _FEW_WEIGHTS
    return worth_it and takes_dense(weight_OK.contiguous())


class CompiledDense(LinearLayer):
    """A bf16 weight as it is stored, maybe mapped from its file, with fp32 inputs and sums.

    Few rows go through the compiled kernel, which reads half the bytes that fp32 weights have. For more rows, tiles of
    output channels are widened and multiplied by BLAS.
    """

    weight: Tensor
    many_rows = _MANY_ROWS

    def __init__(self, weight_OK: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        self.register_buffer("weight", weight_OK.contiguous())

    def product(self, x_MK: Tensor) -> Tensor:
        if len(x_MK) < self.many_rows:
            return product(self.for_kernels(), x_MK.float())
        return product_by_tiles(x_MK.float(), self.out_features, self._widen)

    def for_kernels(self) -> Weight:
        return dense_weight(self.weight)

    def _widen(self, first: int, last: int, to: Tensor) -> None:
        to.copy_(self.weight[first:last])
