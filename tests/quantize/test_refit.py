"""Scales fitted to codes: the quadratic they solve, and rows that never get worse."""

import pytest
import torch

from compress.core.grid import Clip, fit_grid
from compress.core.scheme import Scheme
from compress.core.solve import Factor, factorise
from quantize._refit import Solution, fit_scales, solve

SCHEMES = [Scheme(2, 32), Scheme(3, 48, symmetric=False), Scheme(2, -1), Scheme(4, 64)]


def problem(rows: int = 24, width: int = 192) -> tuple[torch.Tensor, torch.Tensor, Factor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) * 0.1 + torch.eye(width)
    x_NK = torch.randn(600, width, generator=generator) @ mix
    hessian = x_NK.T @ x_NK / len(x_NK)
    damped = hessian + torch.eye(width) * hessian.diagonal().mean() * 0.01
    factor = factorise(hessian.clone())
    assert factor is not None
    return torch.randn(rows, width, generator=generator), damped, factor


def weights_of(solution: Solution) -> torch.Tensor:
    size = solution.grid.scheme.group_size
    size = solution.codes_RK.shape[1] if size == -1 else size
    levels = solution.codes_RK.double()
    if solution.grid.zero is not None:
        levels -= solution.grid.zero.double().repeat_interleave(size, 1)
    return levels * solution.grid.scale.double().repeat_interleave(size, 1)


def loss_of(weight: torch.Tensor, solution: Solution, damped: torch.Tensor) -> torch.Tensor:
    error = weight.double() - weights_of(solution)
    return ((error @ damped.double()) * error).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_loss_is_that_of_the_stored_weights(scheme: Scheme, rounds: int) -> None:
    weight, damped, factor = problem()
    grid = fit_grid(weight, scheme, scale_dtype=torch.bfloat16, clip=Clip())
    solution = solve(weight.clone(), grid, factor, rounds)
    torch.testing.assert_close(solution.loss_R.double(), loss_of(weight, solution, damped), rtol=1e-3, atol=1e-5)
    assert solution.grid.scale.dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_gets_worse_and_all_together_better(scheme: Scheme) -> None:
    weight, _, factor = problem()
    grid = fit_grid(weight, scheme, scale_dtype=torch.bfloat16, clip=Clip())
    losses = [solve(weight.clone(), grid, factor, rounds).loss_R for rounds in (0, 1, 2)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert losses[2].sum() < 0.99 * losses[0].sum()


def test_one_group_reaches_the_optimum_of_its_row() -> None:
    weight, damped, factor = problem()
    grid = fit_grid(weight, Scheme(2, -1), scale_dtype=torch.float32, clip=Clip())
    fitted = fit_scales(weight, solve(weight.clone(), grid, factor, 0), factor)
    codes = fitted.codes_RK.double()
    wanted = ((codes @ damped.double()) * weight).sum(1) / ((codes @ damped.double()) * codes).sum(1)
    torch.testing.assert_close(fitted.grid.scale[:, 0].double(), wanted, rtol=1e-3, atol=1e-6)


def test_a_row_of_zeros_stays() -> None:
    weight, _, factor = problem()
    weight[3] = 0
    grid = fit_grid(weight, Scheme(2, 32), scale_dtype=torch.bfloat16, clip=Clip())
    solution = solve(weight.clone(), grid, factor, 2)
    assert not weights_of(solution)[3].any() and bool(solution.grid.scale.isfinite().all())
