"""Root-mean-square norm (Zhang and Sennrich, 2019, arXiv:1910.07467).

Shape suffixes: T rows (any leading dimensions), D width.
"""

import torch

from runtime.native import norm as native
from runtime.ops.backend import uses_native, uses_triton


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in fp32, rounded to x's dtype.

    As published models do it: the normalised row is rounded before the weight is applied, or, with `plus_one` (Gemma:
    the weight is stored minus one), after.
    """
    if uses_triton(x_TD):
        from runtime.ops.triton.norm import normalise

        return normalise(x_TD, weight_D, eps, plus_one)
    if uses_native(x_TD) and native.takes(x_TD, weight_D):
        return native.normalise(x_TD, weight_D, eps, plus_one)
    return normalise_reference(x_TD, weight_D, eps, plus_one)


def normalise_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """`rms_norm` in torch."""
    wide = x_TD.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (normal * (1 + weight_D.float())).to(x_TD.dtype)
    return normal.to(x_TD.dtype) * weight_D.to(x_TD.dtype)
