"""Grids: spans, the search for them, and rounding."""

import pytest
import torch

from compress.core.grid import Clip, Grid, fit_grid
from compress.core.scheme import Scheme


def weights(rows: int = 16, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def squared_error(grid: Grid, weight: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    residual = (grid.round(weight).dequantize() - weight).square()
    return float((residual if importance is None else residual * importance).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 40])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_within_half_a_step_of_the_span(bits: int, group_size: int, symmetric: bool) -> None:
    weight = weights()
    scheme = Scheme(bits, group_size, symmetric)
    grid = fit_grid(weight, scheme, scale_dtype=torch.float32)
    assert grid.scale.shape == (16, scheme.groups_in(96))
    error = (grid.round(weight).dequantize() - weight).abs()
    steps = 1.01 if not symmetric else 0.51  # an asymmetric zero point is rounded as well
    step = grid.scale.abs().repeat_interleave(96 if group_size == -1 else group_size, dim=1)[:, :96]
    assert bool((error <= steps * step + 1e-6).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_spans_are_never_worse(bits: int, symmetric: bool) -> None:
    weight = weights()
    scheme = Scheme(bits, 32, symmetric)
    plain = fit_grid(weight, scheme, scale_dtype=torch.float32)
    searched = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip())
    assert squared_error(searched, weight) < squared_error(plain, weight)


def test_signed_scales_pay_at_two_bits() -> None:
    weight, scheme = weights(), Scheme(2, 32)
    unsigned = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip(signed=False))
    signed = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip())
    assert bool((signed.scale < 0).any())
    assert squared_error(signed, weight) < 0.95 * squared_error(unsigned, weight)


def test_importance_moves_the_span_to_what_matters() -> None:
    weight, scheme = weights(), Scheme(3, -1)
    importance = torch.full((96,), 0.01)
    importance[:8] = 10
    blind = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip())
    seeing = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip(), importance_K=importance)
    assert squared_error(seeing, weight, importance) < squared_error(blind, weight, importance)


def test_cubes_clip_less() -> None:
    weight, scheme = weights(), Scheme(2, -1)
    squares = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip())
    cubes = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip(cubed=True))
    assert cubes.scale.abs().mean() > 1.02 * squares.scale.abs().mean()
    for power, better, worse in ((2, squares, cubes), (3, cubes, squares)):
        costs = [float((grid.round(weight).dequantize() - weight).abs().pow(power).sum()) for grid in (better, worse)]
        assert costs[0] < costs[1]


@pytest.mark.parametrize("clip", [None, Clip()])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(symmetric: bool, clip: Clip | None) -> None:
    weight = weights()
    weight[:, ::3] = 0
    weight[3] = 0
    grid = fit_grid(weight, Scheme(4, 32, symmetric), scale_dtype=torch.bfloat16, clip=clip)
    assert bool((grid.round(weight).dequantize()[weight == 0] == 0).all())
    assert bool(grid.scale.isfinite().all()) and bool((grid.scale != 0).all())


def test_scales_are_judged_as_they_are_stored() -> None:
    weight, scheme = weights(), Scheme(4, 32)
    grid = fit_grid(weight, scheme, scale_dtype=torch.bfloat16, clip=Clip())
    assert grid.scale.dtype == torch.bfloat16
    stored = grid.round(weight)
    again = Grid(stored.scale, None, scheme).round(weight)
    assert torch.equal(stored.packed, again.packed)


def test_pieces_of_rows_are_searched_alike() -> None:
    weight = weights(rows=4000, width=64)
    scheme = Scheme(4, 32)
    whole = fit_grid(weight, scheme, scale_dtype=torch.float32, clip=Clip())
    part = fit_grid(weight[3000:3010], scheme, scale_dtype=torch.float32, clip=Clip())
    assert torch.equal(whole.scale[3000:3010], part.scale)
