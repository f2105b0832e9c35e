"""8-bit weights through torch's integer kernels: with bf16 inputs, and with int8 inputs (W8A8).

Weights of 5 to 7 bits are kept in 8. One scale per output channel; zero points cost one sum over the inputs of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.tensors import QuantTensor
from runtime.layers.activations import int8_inputs, rounded_inputs
from runtime.layers.base import LinearLayer


def fits_int8(weight: QuantTensor) -> bool:
    """Whether the int8 kernels hold this weight."""
    return weight.scheme.dtype == "int" and weight.scale.shape[1] == 1


class _Int8Weight(LinearLayer):
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.scheme = weight.scheme
        self.register_buffer("codes", weight.codes())
        self.register_buffer("scale", weight.scale[:, 0].float())
        self.register_buffer("zero", None if weight.zero is None else weight.zero[:, 0].float())

    def scaled(self, sums_MO: Tensor, x_MK: Tensor) -> Tensor:
        """Weight scales and zero points applied to fp32 sums of x times codes."""
        if self.zero is not None:
            sums_MO = sums_MO - x_MK.sum(dim=1, keepdim=True, dtype=torch.float32) * self.zero
        return sums_MO * self.scale


class Int8Linear(_Int8Weight):
    """bf16 inputs and fp32 sums."""

    ones: Tensor

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.register_buffer("ones", torch.ones_like(self.scale, dtype=torch.bfloat16))

    def product(self, x_MK: Tensor) -> Tensor:
        x_MK = rounded_inputs(x_MK.float(), self.scheme).bfloat16()
        sums_MO = torch.ops.aten._weight_int8pack_mm(x_MK.contiguous(), self.codes, self.ones)
        return self.scaled(sums_MO.float(), x_MK)


class Int8ProductLinear(_Int8Weight):
    """int8 inputs, one scale per token, found while the model runs; sums are exact whole numbers."""

    def product(self, x_MK: Tensor) -> Tensor:
        codes_MK, scale_M1 = int8_inputs(x_MK.float())
        sums_MO = torch._int_mm(codes_MK, self.codes.T).float()
        return self.scaled(sums_MO, codes_MK) * scale_M1
