"""The maths of keys coded per channel: all tokens of a page share a scale and a lowest number in each channel.

A channel of keys is large or small at all tokens alike, so that few bits spread over one channel lose little where the
same bits spread over one token's channels lose all but the largest (Liu et al., 2024, KIVI, arXiv:2402.02750).

Shape suffixes: N tokens of a page, S any tokens, G key-value heads, D channels of a head, C bytes of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_channels", "encode_channels"]

_HIGHEST = {"int8": 255, "int4": 15}


def encode_channels(codec: str, x_NGD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, G, C] (uint8) under "int8" or "int4", and fp16 numbers [2, G, D]: scales and lowest numbers.

    number = lowest + code * scale. The lowest is rounded down and the scale up, so that no number lies outside the
    codes: beside a huge bias fp16 alone would be off by more than a code. A byte of int4 holds channels i (low bits)
    and i + D / 2. A NaN makes its channel NaN.
    """
    x_NGD, highest = x_NGD.float(), _HIGHEST[codec]
    lowest_GD = _rounded(x_NGD.amin(0), -1)
    scale_GD = _rounded((x_NGD.amax(0) - lowest_GD.float()) / highest, 1)
    step_GD = scale_GD.float()
    codes_NGD = (x_NGD - lowest_GD.float()) / torch.where(step_GD == 0, 1.0, step_GD)
    codes_NGD = codes_NGD.round_().clamp_(0, highest).nan_to_num_(0).to(torch.uint8)
    if codec == "int4":
        low_NGC, high_NGC = codes_NGD.chunk(2, -1)
        codes_NGD = low_NGC | high_NGC << 4
    return codes_NGD, torch.stack([scale_GD, lowest_GD])


def decode_channels(codec: str, codes_SGC: Tensor, numbers_S2GD: Tensor) -> Tensor:
    """fp32 numbers [S, G, D] of codes, each token with the scales and lowest numbers of its page."""
    if codec == "int4":
        codes_SGC = torch.cat([codes_SGC & 15, codes_SGC >> 4], -1)
    scale_SGD, lowest_SGD = numbers_S2GD.float().unbind(-3)
    return codes_SGC.float() * scale_SGD + lowest_SGD


def _rounded(x: Tensor, way: int) -> Tensor:
    """To fp16, up (`way` 1) or down (-1)."""
    half = x.half()
    missed = (half.float() - x) * way < 0
    return torch.where(missed, torch.nextafter(half, torch.full_like(half, way * torch.inf)), half)
