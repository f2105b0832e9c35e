"""What a code stands for before it is scaled, by the scheme's dtype. See Scheme.

nf4: the 16 quantiles of a normal distribution of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), in
ascending order. fp4: sign, two bits of exponent, one of mantissa, in the order of its bit patterns. Both are scaled to
[-1, 1] and are the tables that bitsandbytes stores beside the weights.

dynamic: 8 bits for positive and negative numbers of very different size (Dettmers 2015, https://arxiv.org/abs/1511.04561):
each decade from 1e-7 to 1 has twice as many levels as the one below. Scales are stored in it by double quantization.

mxfp4, nvfp4: the 4-bit float of the microscaling formats (Open Compute Project, MX specification 1.0, section 5.3.3)
in the order of its bit patterns: sign, two bits of exponent, one of mantissa, from -6 to 6, and not scaled.
"""

from __future__ import annotations

from functools import cache

import torch

from compress.core.scheme import OWN_GROUPS, Scheme

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_DECADES = 7
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LARGEST = 6.0
_HALVES = torch.tensor((0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7), dtype=torch.uint8)  # twice a level -> code
_EXPONENT = 0x7F800000
_LAST_BIT_A_HALF = 1.5 * 2**22  # fp32 numbers near it are multiples of 0.5


@cache
def table(dtype: str) -> torch.Tensor:
    """The 16 levels of a 4-bit dtype, fp32 on the CPU. Not to be changed in place."""
    if dtype == "nf4":
        return torch.tensor(_NF4)
    if dtype in OWN_GROUPS:
        positive = torch.tensor(_E2M1)
        return torch.cat((positive, -positive))
    positive = torch.tensor(_FP4) / 12
    return torch.cat((positive, 0 - positive))


def levels(stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """fp32 levels of stored codes (uint8, any shape)."""
    if scheme.dtype == "int":
        return stored.float() + scheme.lowest
    if scheme.dtype == "fp8":
        return stored.view(torch.float8_e4m3fn).float()
    return table(scheme.dtype).to(stored.device)[stored.int()]


@cache
def ascending(dtype: str) -> torch.Tensor:
    """`table` in ascending order."""
    return table(dtype).sort().values


@cache
def dynamic() -> torch.Tensor:
    """The 256 levels of the dynamic type, fp32 on the CPU, ascending. Not to be changed in place."""
    found = [torch.zeros(1), torch.ones(1)]
    for decade in range(_DECADES):
        borders = torch.linspace(0.1, 1, 2**decade + 1)
        levels = (borders[:-1] + borders[1:]) / 2 * 10 ** (decade + 1 - _DECADES)
        found += [levels, -levels]
    return torch.cat(found).sort().values


def nearest(numbers: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """uint8 places of the levels (ascending) that are closest to fp32 numbers of any shape; of two, the lower one."""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(numbers, middles.to(numbers.device), out_int32=True).to(torch.uint8)


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The level of the 4-bit float that is nearest to each element, fp32; halfway, the one with an even mantissa."""
    size = x.abs().clamp_(max=E2M1_LARGEST)
    octave = (size.clamp(min=1).view(torch.int32) & _EXPONENT).view(torch.float32)
    shift = octave.mul_(_LAST_BIT_A_HALF)
    return size.add_(shift).sub_(shift).copysign_(x)


def e2m1_codes(level: torch.Tensor) -> torch.Tensor:
    """Codes uint8 of levels of the 4-bit float; zero has no sign."""
    twice = level.abs().mul_(2).to(torch.int32)
    code = torch.index_select(_HALVES.to(level.device), 0, twice.flatten()).view(level.shape)
    return code.add_((level < 0).to(torch.uint8), alpha=8)
