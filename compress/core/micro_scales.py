"""Scales of the 4-bit float formats: powers of two for mxfp4, 8-bit floats over one divisor for nvfp4.

mxfp4: Open Compute Project, Microscaling Formats (MX) specification 1.0. nvfp4: NVIDIA, "Introducing NVFP4" (2025).
There are few scales to choose from, so that a search tries those near the one that reaches a group's largest weight:
smaller ones clip it, and larger ones of nvfp4 place it on a level below the highest, whose neighbours are closer (Cook
et al., 2025, arXiv:2512.02010).

Shape suffixes: O output channels, G groups, S channels of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.core.levels import E2M1_LARGEST
from compress.core.rounding_error import rounding_error
from compress.core.scheme import Scheme
from compress.core.tensors import unit_of

_E4M3_LARGEST = 448.0
_BIAS = 127


@dataclass(frozen=True, slots=True)
class Scales:
    """A dtype of scales whose bit patterns rise with the scale, the patterns that are used, and how far from the
    reaching one a search goes."""

    dtype: torch.dtype
    lowest: int
    highest: int
    tried: range


SCALES = {
    "mxfp4": Scales(torch.float8_e8m0fnu, 1, 254, range(0, -3, -1)),
    "nvfp4": Scales(torch.float8_e4m3fn, 1, 126, range(5, -9, -1)),
}


def divisor_for(largest: torch.Tensor) -> torch.Tensor:
    """The divisor of scales, fp32 [1], under which the largest weight's group has the largest scale; 1 where no finite
    number is."""
    divisor = _E4M3_LARGEST * E2M1_LARGEST / largest.float().reshape(1)
    return torch.where(divisor.isfinite(), divisor, 1.0)


def reaching(groups_OGS: torch.Tensor, scheme: Scheme, divisor: torch.Tensor | None) -> torch.Tensor:
    """The smallest scale [O, G] whose highest level is not below any weight of the group."""
    scales = SCALES[scheme.dtype]
    return _stored(_reaching_patterns(groups_OGS, scales, divisor), scales)


def search(
    groups_OGS: torch.Tensor,
    scheme: Scheme,
    divisor: torch.Tensor | None,
    importance_GS: torch.Tensor | None,
    *,
    cubed: bool,
) -> torch.Tensor:
    """The scale [O, G] of every group with the least rounding error, squared or cubed, weighted by `importance_GS`."""
    scales = SCALES[scheme.dtype]
    first_OG = _reaching_patterns(groups_OGS, scales, divisor)
    best_OG, least_OG = first_OG, torch.full(first_OG.shape, torch.inf, device=first_OG.device)
    for shift in scales.tried:
        pattern_OG = (first_OG + shift).clamp_(scales.lowest, scales.highest)
        unit_OG = unit_of(_stored(pattern_OG, scales), divisor)
        error_OG = rounding_error(groups_OGS, unit_OG, None, importance_GS, scheme, cubed=cubed)
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best_OG = torch.where(better_OG, pattern_OG, best_OG)
    return _stored(best_OG, scales)


def _reaching_patterns(groups_OGS: torch.Tensor, scales: Scales, divisor: torch.Tensor | None) -> torch.Tensor:
    """Their bit patterns, int32; a group of zeros has the scale 1."""
    wanted_OG = groups_OGS.abs().amax(-1).div_(E2M1_LARGEST)
    if scales.dtype is torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(wanted_OG)
        pattern_OG = exponent + _BIAS - (mantissa == 0.5).to(torch.int32)
        pattern_OG = torch.where(wanted_OG > 0, pattern_OG, _BIAS)
    else:
        if divisor is not None:
            wanted_OG.mul_(divisor)
        nearest_OG = wanted_OG.clamp_(max=_E4M3_LARGEST).to(scales.dtype)
        below = nearest_OG.float() < wanted_OG
        pattern_OG = nearest_OG.view(torch.uint8).to(torch.int32) + below
    return pattern_OG.clamp_(scales.lowest, scales.highest)


def _stored(pattern_OG: torch.Tensor, scales: Scales) -> torch.Tensor:
    return pattern_OG.to(torch.uint8).view(scales.dtype)
