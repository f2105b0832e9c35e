"""Inputs in 8 bits, as compressed-tensors defines them: with a scale per token, or per token and group of channels,
that is found while the model runs, or with a static one that is stored beside the weight.

Shape suffixes: M rows of a batch, K input channels, S channels of a group, R rows of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.grid import FP8_LARGEST, INT8_REACH
from compress.core.scheme import Scheme

_FP8 = torch.float8_e4m3fn
_TINY = torch.finfo(torch.float32).tiny


def int8_inputs(x_MK: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scales fp32 [M, 1] (`static` [1] if given) of fp32 rows; x is about code * scale."""
    scale_M1 = _per_token(x_MK, INT8_REACH) if static is None else static
    return (x_MK / scale_M1).round_().clamp_(-128, 127).to(torch.int8), scale_M1


def fp8_inputs(x_MK: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes float8 e4m3 [M, K] and scales fp32 [M, 1] (`static` [1] if given) of fp32 rows."""
    scale_M1 = _per_token(x_MK, FP8_LARGEST) if static is None else static
    return (x_MK / scale_M1).clamp_(-FP8_LARGEST, FP8_LARGEST).to(_FP8), scale_M1


def _per_token(x_MK: Tensor, reach: float) -> Tensor:
    return x_MK.abs().amax(dim=1, keepdim=True).div_(reach).clamp_(min=_TINY)


def rounded_inputs(x_MK: Tensor, scheme: Scheme, static: Tensor | None = None) -> Tensor:
    """The fp32 rows as the scheme's 8-bit inputs stand for them; unchanged if it leaves inputs alone. `static` fp32 [1]
    is the scale of static inputs."""
    if scheme.activation_bits == 16:
        return x_MK
    if scheme.blocks:
        x_RS = x_MK.reshape(-1, scheme.group_size)
        codes_RS, scale_R1 = fp8_inputs(x_RS)
        return (codes_RS.float() * scale_R1).view_as(x_MK)
    codes_MK, scale_M1 = (fp8_inputs if scheme.dtype == "fp8" else int8_inputs)(x_MK, static)
    return codes_MK.float() * scale_M1
