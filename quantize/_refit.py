"""Scales fitted to codes: after a sweep has chosen the codes, the scales that cost the least output error.

With codes fixed, the error tr(E H Eᵀ) of E = W - s Q is a quadratic in the scales: one coordinate after another goes to
its optimum, rounded to what is stored. Each step can only lower the error, and so can the next sweep on the new scales
where it is kept. Shape suffixes: R rows, K input channels, G groups, S channels of one group.
"""

from dataclasses import dataclass, replace

import torch

from compress.core.grid import Grid
from compress.core.solve import Factor
from compress.core.tensors import spread
from quantize._sweep import quantize_rows


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes int8 [R, K], their grid, and each row's weighted squared error [R]."""

    codes_RK: torch.Tensor
    grid: Grid
    loss_R: torch.Tensor


def solve(weight_RK: torch.Tensor, grid: Grid, factor: Factor, rounds: int, *, keep_zeros: bool = False) -> Solution:
    """GPTQ's sweep over `weight_RK` (overwritten if `rounds` is 0), then `rounds` times scales to codes and a sweep on
    them; a row keeps the best that it has had. keep_zeros: weights that are zero stay zero."""
    if rounds == 0:
        codes_RK, loss_R = quantize_rows(weight_RK, grid, factor, keep_zeros=keep_zeros)
        return Solution(codes_RK, grid, loss_R)
    codes_RK, loss_R = quantize_rows(weight_RK.clone(), grid, factor, keep_zeros=keep_zeros)
    best = Solution(codes_RK, grid, loss_R)
    for _ in range(rounds):
        best = fit_scales(weight_RK, best, factor)
        codes_RK, loss_R = quantize_rows(weight_RK.clone(), best.grid, factor, keep_zeros=keep_zeros)
        better_R = loss_R < best.loss_R
        codes_RK = torch.where(better_R[:, None], codes_RK, best.codes_RK)
        best = Solution(codes_RK, best.grid, torch.minimum(loss_R, best.loss_R))
    return fit_scales(weight_RK, best, factor)


def fit_scales(weight_RK: torch.Tensor, solution: Solution, factor: Factor) -> Solution:
    """One pass of coordinate descent over the scales of all groups, with the codes as they are."""
    grid, width = solution.grid, weight_RK.shape[1]
    size = grid.scheme.group_width(width)
    place_K = torch.empty_like(factor.order_K)
    place_K[factor.order_K] = torch.arange(width, device=place_K.device)
    scale_RG = grid.scale.float()
    levels_RK = solution.codes_RK.float()
    if grid.zero is not None:
        levels_RK -= spread(grid.zero.float(), size, width)
    error_RK = weight_RK - levels_RK * spread(scale_RG, size, width)
    error_RK = (error_RK[:, factor.order_K] @ factor.feedback_KK).mul_(factor.diagonal_K)
    for g in range(scale_RG.shape[1]):
        channels = slice(g * size, (g + 1) * size)
        step_RK = (levels_RK[:, channels] @ factor.feedback_KK[place_K[channels]]).mul_(factor.diagonal_K)
        power_R = step_RK.square().sum(1)
        change_R = (error_RK * step_RK).sum(1) / power_R.clamp(min=torch.finfo(power_R.dtype).tiny)
        fitted_R = (scale_RG[:, g] + change_R).to(grid.scale.dtype).float()
        usable_R = (power_R > 0) & (fitted_R != 0) & fitted_R.isfinite()
        fitted_R = torch.where(usable_R, fitted_R, scale_RG[:, g])
        error_RK.addcmul_(step_RK, (scale_RG[:, g] - fitted_R)[:, None])
        scale_RG[:, g] = fitted_R
    fitted = replace(grid, scale=scale_RG.to(grid.scale.dtype))
    return Solution(solution.codes_RK, fitted, error_RK.square_().sum(1))
