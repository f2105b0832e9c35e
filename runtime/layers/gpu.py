"""Packed weights on a GPU, through the operation `low_bit_matmul`: a Triton kernel for integer schemes."""

from __future__ import annotations

from torch import Tensor

from compress.core.compiling import triton_installed
from compress.core.rounded_inputs import rounded_inputs
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime.layers.packed import PackedLinear
from runtime.ops.low_bit import low_bit_matmul


class GpuLinear(PackedLinear):
    """Weights become dense in registers or, without a kernel for the scheme, some output channels at a time."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, _slow_reason(weight.scheme))

    def product(self, x_MK: Tensor) -> Tensor:
        if self.scheme.activation_bits != 16:
            x_MK = rounded_inputs(x_MK.float(), self.scheme, self.input_scale).to(x_MK.dtype)
        return low_bit_matmul(x_MK, self.weight)


def _slow_reason(scheme: Scheme) -> str:
    if not triton_installed():
        return "triton is not installed: weights are dequantized at each step"
    from runtime.ops.triton.low_bit import supports

    if not supports(scheme):
        return f"there is no GPU kernel for {scheme.name} weights: they are dequantized at each step"
    if scheme.activation_bits == 8:
        return "inputs are rounded to 8 bits, but products are those of the dense dtype"
    return ""
