"""Products with packed integer weights: fp activations, codes of 2 to 8 bits (W4A16 and kin).

Shape suffixes: T rows, K input channels, O output channels, W 32-bit words of a row, G groups of a row.
"""

import torch

from compress.core.tensors import QuantTensor
from runtime.ops.backend import uses_triton

_ROWS = 1024  # output channels that are dense at once in the reference


def low_bit_matmul(x_TK: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """x @ weight.T in x's dtype: [T, O]. The packed weight is never dense as a whole."""
    if uses_triton(x_TK):
        from runtime.ops.triton.low_bit import matmul, supports

        if supports(weight.scheme):
            return matmul(x_TK, weight)
    return matmul_reference(x_TK, weight)


def matmul_reference(x_TK: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """`low_bit_matmul` in torch: weights in x's dtype, some output channels at a time."""
    rows = weight.shape[0]
    out_TO = x_TK.new_empty((x_TK.shape[0], rows))
    for first in range(0, rows, _ROWS):
        part = slice(first, min(first + _ROWS, rows))
        torch.matmul(x_TK, weight.at(part).dequantize(x_TK.dtype).T, out=out_TO[:, part])
    return out_TO
