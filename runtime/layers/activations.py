"""Inputs in 8 bits, with a scale per token found while the model runs, as compressed-tensors defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.scheme import Scheme

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = 448.0
_HALF_RANGE = 127.5  # of the codes -128 … 127
_TINY = torch.finfo(torch.float32).tiny


def int8_inputs(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scales fp32 [M, 1] of fp32 rows; x is about code * scale."""
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).div_(_HALF_RANGE).clamp_(min=_TINY)
    return (x_MK / scale_M1).round_().clamp_(-128, 127).to(torch.int8), scale_M1


def fp8_inputs(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8 e4m3 [M, K] and scales fp32 [M, 1] of fp32 rows."""
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).div_(_FP8_LARGEST).clamp_(min=_TINY)
    return (x_MK / scale_M1).clamp_(-_FP8_LARGEST, _FP8_LARGEST).to(_FP8), scale_M1


def rounded_inputs(x_MK: Tensor, scheme: Scheme) -> Tensor:
    """The fp32 rows as the scheme's 8-bit inputs stand for them; unchanged if it leaves inputs alone."""
    if scheme.activation_bits == 16:
        return x_MK
    codes_MK, scale_M1 = fp8_inputs(x_MK) if scheme.dtype == "fp8" else int8_inputs(x_MK)
    return codes_MK.float() * scale_M1
