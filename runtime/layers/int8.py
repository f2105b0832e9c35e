"""8-bit weights through torch's integer kernels: with bf16 inputs, and with int8 inputs (W8A8).

Weights of 5 to 7 bits are kept in 8. One scale per output channel; zero points cost one sum over the inputs of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.int8_products import fast_int8_products, int8_product
from compress.core.rounded_inputs import int8_inputs, rounded_inputs
from compress.core.tensors import QuantTensor
from runtime.layers.base import LinearLayer


class _Int8Weight(LinearLayer):
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, input_scale=weight.input_scale)
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

    def product(self, x_MK: Tensor) -> Tensor:
        x_MK = rounded_inputs(x_MK.float(), self.scheme, self.input_scale).bfloat16()
        return self.scaled(_bf16_times_int8(x_MK, self.codes), x_MK)


class Int8ProductLinear(_Int8Weight):
    """int8 inputs, one scale per token, found while the model runs, or a static one; bf16 holds their codes exactly."""

    def product(self, x_MK: Tensor) -> Tensor:
        codes_MK, scale_M1 = int8_inputs(x_MK.float(), self.input_scale)
        exact = fast_int8_products()
        sums_MO = int8_product(codes_MK, self.codes) if exact else _bf16_times_int8(codes_MK.bfloat16(), self.codes)
        return self.scaled(sums_MO.float(), codes_MK) * scale_M1


def _bf16_times_int8(x_MK: Tensor, codes_OK: Tensor) -> Tensor:
    """The kernel's own scales are bf16; ours are applied to its sums instead."""
    ones = torch.ones(len(codes_OK), dtype=torch.bfloat16)
    return torch.ops.aten._weight_int8pack_mm(x_MK.contiguous(), codes_OK, ones).float()
