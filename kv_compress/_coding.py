"""The maths of coded keys and values: numbers into codes and back, and the rotation that spreads outliers first.

Every token and head is coded by itself, when it is stored: the result depends neither on other tokens nor on when.

Shape suffixes: T tokens (or any leading dimensions), G key-value heads, D channels of a head, C bytes of codes, N fp16
numbers beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_compress.fp8 import LARGEST

__all__ = ["code_dtype", "decode", "encode", "hadamard", "round_trip"]

_INT8, _INT4 = 127, 15


def code_dtype(codec: str) -> torch.dtype:
    """The dtype in which codes are stored; those of fp8 as bytes."""
    return torch.int8 if codec == "int8" else torch.uint8


def encode(codec: str, x_TGD: Tensor, scale_G: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Codes [T, G, C] and fp16 numbers [T, G, N] of `x_TGD` under "int8", "int4" or "fp8".

    int8: N = 1, the scale. int4: N = 2, scale and lowest number. fp8: no numbers; `scale_G` (fp32, one or one for each
    head) is what numbers are divided by, and what is too large is clipped. A NaN stays one (of int8 and int4 its row).
    """
    x_TGD = x_TGD.float()
    if codec == "int8":
        scale_TG1 = (x_TGD.abs().amax(-1, keepdim=True) / _INT8).half()
        codes_TGD = (x_TGD * _inverse(scale_TG1)).round().clamp_(-_INT8, _INT8)
        return codes_TGD.nan_to_num_(0).to(torch.int8), scale_TG1
    if codec == "int4":
        lowest_TG1 = x_TGD.amin(-1, keepdim=True)
        scale_TG1 = ((x_TGD.amax(-1, keepdim=True) - lowest_TG1) / _INT4).half()
        lowest_TG1 = lowest_TG1.half()
        codes_TGD = ((x_TGD - lowest_TG1.float()) * _inverse(scale_TG1)).round().clamp_(0, _INT4)
        low_TGC, high_TGC = codes_TGD.nan_to_num_(0).to(torch.uint8).chunk(2, -1)
        return low_TGC | high_TGC << 4, torch.cat([scale_TG1, lowest_TG1], -1)
    scaled_TGD = (x_TGD / _of_heads(scale_G)).clamp_(-LARGEST, LARGEST)
    return scaled_TGD.to(torch.float8_e4m3fn).view(torch.uint8), None


def decode(codec: str, codes_TGC: Tensor, numbers_TGN: Tensor | None, scale_G: Tensor | None = None) -> Tensor:
    """The fp32 numbers [T, G, D] that `encode` left."""
    if codec == "fp8":
        return codes_TGC.view(torch.float8_e4m3fn).float() * _of_heads(scale_G)
    if numbers_TGN is None:
        raise ValueError(f"codes of {codec} without their numbers")
    if codec == "int8":
        return codes_TGC.float() * numbers_TGN.float()
    scale_TG1, lowest_TG1 = numbers_TGN.float().chunk(2, -1)
    return torch.cat([codes_TGC & 15, codes_TGC >> 4], -1).float() * scale_TG1 + lowest_TG1


def round_trip(codec: str, x_TGD: Tensor, scale_G: Tensor | None = None, *, rotate: bool = False) -> Tensor:
    """What attention sees of `x_TGD`, in its dtype: coded and decoded under `codec` ("full": as it is), with `rotate`
    between two rotations."""
    if codec == "full":
        return x_TGD
    turned_TGD = hadamard(x_TGD.float()) if rotate else x_TGD
    seen_TGD = decode(codec, *encode(codec, turned_TGD, scale_G), scale_G)
    return (hadamard(seen_TGD) if rotate else seen_TGD).to(x_TGD.dtype)


def hadamard(x_TGD: Tensor) -> Tensor:
    """x H for the Hadamard matrix of the last dimension (a power of two), scaled so that H Hᵀ = 1: products of two
    rotated vectors are those of the vectors themselves, and a second rotation undoes the first.

    Ashkboos et al., 2024, arXiv:2404.00456, use it on cached keys and values. Computed as additions alone, in a fixed
    order: a row's bits do not depend on other rows.
    """
    shape, width = x_TGD.shape, x_TGD.shape[-1]
    half = 1
    while half < width:
        a, b = x_TGD.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        x_TGD = torch.stack([a + b, a - b], -2).reshape(shape)
        half *= 2
    return x_TGD * width**-0.5


def _inverse(scale_TG1: Tensor) -> Tensor:
    """1 / scale, and 0 of 0: then all codes are 0."""
    scale_TG1 = scale_TG1.float()
    return torch.where(scale_TG1 == 0, 0.0, 1 / scale_TG1)


def _of_heads(scale_G: Tensor | None) -> Tensor:
    if scale_G is None:
        raise ValueError("fp8 needs its scales")
    return scale_G.reshape(-1, 1)
