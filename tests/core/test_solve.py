"""The solver against the textbook form of GPTQ, and against Hessians that are hard to factorise."""

import pytest
import torch

from compress.core.errors import InputError
from compress.core.solve import ByColumn, Factor, factorise, sweep


def problem(width: int = 192, rows: int = 24, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * 0.1 + torch.eye(width)
    x_NK = torch.randn(tokens, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), x_NK.T @ x_NK / tokens


def damped(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return hessian + torch.eye(len(hessian)) * hessian.diagonal().mean() * damping


def round_to_quarters(k: int, target: torch.Tensor) -> torch.Tensor:
    return (target * 4).round() / 4


QUARTERS = ByColumn(round_to_quarters)


def textbook_gptq(weight: torch.Tensor, hessian: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Algorithm 1 of arXiv:2210.17323 column by column in fp64, with the inverse's Cholesky factor."""
    weight = weight.double()[:, order].clone()
    inverse = torch.linalg.inv(damped(hessian).double()[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    rounded = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        rounded[:, i] = round_to_quarters(i, weight[:, i])
        error = (weight[:, i] - rounded[:, i]) / upper[i, i]
        weight[:, i:] -= error[:, None] * upper[i, i:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result.float()


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("block_size", [1, 50, 128, 1000])
def test_equals_textbook_gptq(block_size: int, activation_order: bool) -> None:
    weight, hessian = problem()
    order = torch.argsort(hessian.diagonal(), stable=True) if activation_order else torch.arange(192)
    expected = textbook_gptq(weight, hessian, order.flip(0).tolist())
    factor = factorise(hessian.clone(), activation_order=activation_order)
    assert factor is not None and factor.retries == 0
    solved = weight.clone()
    sweep(solved, factor, QUARTERS, block_size)
    # a target half-way between two points may fall either way in another precision, and moves what follows
    assert (solved == expected).float().mean() > 0.98


@pytest.mark.parametrize("width", [5, 192, 1500])
def test_the_factor_is_the_hessian(width: int) -> None:
    _, hessian = problem(width=width, tokens=300)
    factor = factorise(hessian.clone())
    assert factor is not None
    lower = torch.tril(factor.feedback_KK) * factor.diagonal_K
    expected = damped(hessian)[factor.order_K][:, factor.order_K]
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert bool((expected.diagonal().diff() >= 0).all())


def test_reported_loss_is_the_weighted_error() -> None:
    weight, hessian = problem()
    factor = factorise(hessian.clone())
    assert factor is not None
    solved = weight.clone()
    loss = sweep(solved, factor, QUARTERS)
    error = weight - solved
    torch.testing.assert_close(loss, ((error @ damped(hessian)) * error).sum(1), rtol=1e-3, atol=1e-4)


def test_beats_rounding_to_nearest() -> None:
    weight, hessian = problem()
    factor = factorise(hessian.clone())
    assert factor is not None
    solved = weight.clone()
    sweep(solved, factor, QUARTERS)

    def loss(other: torch.Tensor) -> float:
        return float((((weight - other) @ hessian) * (weight - other)).sum())

    assert loss(solved) < 0.8 * loss(round_to_quarters(0, weight))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    weight, hessian = problem(rows=48)
    factor = factorise(hessian.clone())
    assert factor is not None
    whole, part = weight.clone(), weight[16:32].clone()
    sweep(whole, factor, QUARTERS)
    sweep(part, factor, QUARTERS)
    assert (whole[16:32] == part).float().mean() > 0.98


def test_an_indefinite_hessian_climbs_the_ladder() -> None:
    """Few tokens leave most of the spectrum at zero; what rounding makes negative takes more damping."""
    _, hessian = problem(tokens=20)
    hessian -= torch.eye(192) * hessian.diagonal().mean() * 0.05
    mean = hessian.diagonal().mean()
    factor = factorise(hessian.clone())
    assert factor is not None
    assert factor.retries == 1 and factor.damping == pytest.approx(0.1)
    lower = torch.tril(factor.feedback_KK) * factor.diagonal_K
    expected = (hessian + torch.eye(192) * mean * 0.1)[factor.order_K][:, factor.order_K]
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_hopeless_hessian_is_given_up() -> None:
    _, hessian = problem()
    off_diagonal = hessian * 1e4
    off_diagonal.diagonal().copy_(hessian.diagonal())
    assert factorise(off_diagonal) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_factorised(poison: float) -> None:
    _, hessian = problem()
    hessian[3, 3] = poison
    assert factorise(hessian) is None


def test_all_zero_is_not_factorised() -> None:
    assert factorise(torch.zeros(8, 8)) is None


def test_silent_channels_are_rounded_to_nearest_and_disturb_nobody() -> None:
    weight, hessian = problem()
    hessian[10], hessian[:, 10] = 0, 0
    factor = factorise(hessian.clone())
    assert factor is not None
    solved = weight.clone()
    sweep(solved, factor, QUARTERS)
    assert torch.equal(solved[:, 10], round_to_quarters(10, weight[:, 10]))
    assert bool(solved.isfinite().all())


def test_damping_must_be_positive() -> None:
    with pytest.raises(InputError, match="damping"):
        factorise(torch.eye(3), damping=0)


def test_factor_lives_in_the_memory_of_the_hessian() -> None:
    _, hessian = problem()
    factor = factorise(hessian)
    assert isinstance(factor, Factor)
    assert factor.feedback_KK.data_ptr() == hessian.data_ptr()
