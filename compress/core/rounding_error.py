"""How far weights are from the nearest points of a grid: what a search for scales makes least.

Shape suffixes: O output channels, G groups, S channels of one group.
"""

import torch

from compress.core import native
from compress.core.levels import ascending, nearest
from compress.core.scheme import Scheme


def rounding_error(
    groups_OGS: torch.Tensor,
    unit_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    importance_GS: torch.Tensor | None,
    scheme: Scheme,
    *,
    cubed: bool,
) -> torch.Tensor:
    """The sum of squared (or cubed) errors of every group, weighted by `importance_GS`, fp32 [O, G]. All fp32, and
    `unit_OG` is what a level of 1 stands for."""
    if native.serves(groups_OGS):
        if scheme.dtype != "int":
            return native.level_error(groups_OGS, unit_OG, importance_GS, ascending(scheme.dtype), cubed)
        levels = (scheme.lowest, scheme.highest)
        return native.rounding_error(groups_OGS, unit_OG, zero_OG, importance_GS, levels, cubed)
    exact = groups_OGS * (1 / unit_OG)[..., None]
    if zero_OG is not None:
        exact += zero_OG[..., None]
    power = 3 if cubed else 2
    cost = _rounded(exact, scheme).sub_(exact).abs_().pow_(power)
    if importance_GS is not None:
        cost *= importance_GS
    return cost.sum(-1).mul_(unit_OG.abs().pow_(power))


def _rounded(exact: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.dtype == "int":
        return exact.round().clamp_(scheme.lowest, scheme.highest)
    levels = ascending(scheme.dtype).to(exact.device)
    return levels[nearest(exact, levels).int()]
