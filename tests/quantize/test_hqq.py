"""HQQ: it lowers the norm that it is about, forgives outliers, and ends on grids that formats hold."""

from __future__ import annotations

import pytest
import torch

from compress.core.grid import Grid, fit_grid
from compress.core.scheme import Scheme
from quantize._hqq import half_quadratic, shrink

ROWS, WIDTH, GROUP = 24, 128, 32
schemes = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def weight_with_outliers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    weight[:, ::GROUP] *= 6
    return weight


def norm_of_error(weight: torch.Tensor, grid: Grid, norm: float) -> torch.Tensor:
    """Σ|w - ŵ|ᵖ of every group."""
    error = grid.round(weight).dequantize() - weight
    return error.abs().pow(norm).unflatten(1, (-1, GROUP)).sum(-1)


@schemes
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_group_gains_or_stays(bits: int, symmetric: bool) -> None:
    weight = weight_with_outliers()
    start = fit_grid(weight, Scheme(bits, GROUP, symmetric), scale_dtype=torch.float16)
    before = norm_of_error(weight, start, 0.7)
    after = norm_of_error(weight, half_quadratic(weight, start), 0.7)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.98 * float(before.sum())


@schemes
def test_stock_formats_hold_the_grid(symmetric: bool) -> None:
    weight = weight_with_outliers()
    start = fit_grid(weight, Scheme(3, GROUP, symmetric), scale_dtype=torch.bfloat16)
    grid = half_quadratic(weight, start)
    assert grid.scale.dtype is torch.bfloat16 and bool(grid.scale.isfinite().all())
    if symmetric:
        assert grid.zero is None
    else:
        assert grid.zero is not None and grid.zero.dtype is torch.int8
        assert int(grid.zero.min()) >= -4 and int(grid.zero.max()) <= 3


def test_a_lower_norm_cares_less_about_outliers() -> None:
    weight = weight_with_outliers()
    start = fit_grid(weight, Scheme(3, GROUP), scale_dtype=torch.float32)
    ordinary = torch.ones(WIDTH, dtype=torch.bool)
    ordinary[::GROUP] = False
    errors = {}
    for norm in (0.5, 2.0):
        error = half_quadratic(weight, start, norm=norm, iterations=40).round(weight).dequantize() - weight
        errors[norm] = (float(error[:, ordinary].abs().median()), float(error[:, ~ordinary].abs().mean()))
    assert errors[0.5][0] < errors[2.0][0]
    assert errors[0.5][1] > errors[2.0][1]


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("residual", [-3.0, -0.4, 0.0, 0.2, 1.0, 2.5])
def test_shrinking_is_a_step_towards_the_minimum(norm: float, residual: float) -> None:
    """|e|ᵖ/p + β/2 (r - e)² is no larger at the shrunken error than at keeping or dropping it whole, for large ones."""
    beta = 4.0
    shrunken = float(shrink(torch.tensor(residual), beta, norm))
    assert abs(shrunken) <= abs(residual) and shrunken * residual >= 0

    def cost(e: float) -> float:
        return abs(e) ** norm / norm + beta / 2 * (residual - e) ** 2

    if abs(residual) >= 1:
        assert cost(shrunken) <= min(cost(residual), cost(0.0))
    elif abs(residual) <= 0.2:
        assert shrunken == 0


@schemes
def test_a_zero_group_stays_zero(symmetric: bool) -> None:
    weight = weight_with_outliers()
    weight[3, :GROUP] = 0
    start = fit_grid(weight, Scheme(4, GROUP, symmetric), scale_dtype=torch.float32)
    assert bool((half_quadratic(weight, start).round(weight).dequantize()[3, :GROUP] == 0).all())
