"""OSSCAR's maths against direct solutions: least squares, inverses, every choice there is."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from compress.core.errors import InputError
from prune._osscar import Problem, downdate, eliminate, insertion_gains, removal_costs
from prune._units import Units

DAMPING = 0.01


def moments(width: int, seed: int = 0, tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    found_KK = inputs.t() @ inputs / tokens
    return (found_KK + found_KK.t()) / 2


def weight_of(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def problem_of(units: Units, rows: int = 5) -> Problem:
    width = units.columns_UC.numel()
    return Problem(weight_of(rows, width), moments(width), units, DAMPING)


def error_of(problem: Problem, weight_RK: Tensor, rows: int = 5) -> float:
    lost_RK = weight_of(rows, weight_RK.shape[1]).double() - weight_RK
    return float(((lost_RK @ problem.moments_KK) * lost_RK).sum())


@pytest.mark.parametrize("size", [1, 3])
def test_the_fit_is_the_least_squares_solution(size: int) -> None:
    units = Units.alike(12 // size, size, 6 // size)
    problem = problem_of(units)
    kept = [0, 2] if size == 3 else [0, 3, 4, 7, 8, 11]
    weight_RK, loss = problem.fit(kept)
    root_KK = torch.linalg.cholesky(problem.moments_KK).t()
    index_S = units.channels(kept)
    aim = root_KK @ weight_of(5, 12).double().t()
    direct = torch.linalg.lstsq(root_KK[:, index_S], aim).solution.t()
    assert torch.allclose(weight_RK[:, index_S], direct, rtol=0, atol=1e-10)
    gone = torch.ones(12, dtype=torch.bool)
    gone[index_S] = False
    assert not weight_RK[:, gone].any()
    assert loss == pytest.approx(error_of(problem, weight_RK), rel=1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_downdates_equal_a_new_inverse(size: int) -> None:
    units = Units.alike(24 // size, size, 2)
    problem = problem_of(units)
    inverse_KK = torch.linalg.inv(problem.moments_KK)
    weight_RK = problem.aim_RK @ inverse_KK
    kept = list(range(units.count))
    for gone in ([1], [3, 0], [5]):
        downdate(weight_RK, inverse_KK, units.channels(gone))
        kept = [unit for unit in kept if unit not in gone]
        index_S = units.channels(kept)
        direct = torch.linalg.inv(problem.moments_KK[index_S][:, index_S])
        assert float((inverse_KK[index_S][:, index_S] - direct).abs().max()) < 1e-8
        assert torch.allclose(weight_RK, problem.fit(kept)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2])
def test_costs_and_gains_are_the_changes_of_the_error(size: int) -> None:
    units = Units.alike(10 // size, size, 4)
    problem = problem_of(units)
    kept = list(range(units.count))[::2]
    outside = [unit for unit in range(units.count) if unit not in kept]
    loss = problem.fit(kept)[1]
    costs = removal_costs(*problem.within(kept), units.within(kept), range(len(kept)))
    gains = insertion_gains(problem, kept, outside)
    for place, unit in enumerate(kept):
        without = problem.fit([other for other in kept if other != unit])[1]
        assert float(costs[place]) == pytest.approx(without - loss, rel=1e-8)
    for place, unit in enumerate(outside):
        joined = problem.fit(sorted([*kept, unit]))[1]
        assert float(gains[place]) == pytest.approx(loss - joined, rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_among_the_best_of_all(seed: int) -> None:
    units = Units.alike(10, 1, 5)
    problem = Problem(weight_of(4, 10, seed), moments(10, seed), units, DAMPING)
    every = sorted(problem.fit(choice)[1] for choice in combinations(range(10), 5))
    found = problem.solve(rounds=5, swaps=20)
    loss = problem.fit(found.kept)[1]
    assert loss <= every[len(every) // 32]  # of 252
    assert loss <= problem.fit(eliminate(problem, 5))[1] * (1 + 1e-9)
    assert len(found.kept) == 5 and 0 < found.error < 1


def test_fewer_rounds_cost_little() -> None:
    units = Units.alike(64, 1, 32)
    problem = problem_of(units)
    slow, quick = (problem.solve(rounds, 0).error for rounds in (32, 4))
    assert slow <= quick < 1.5 * slow


def test_every_pool_keeps_its_quota() -> None:
    channels = torch.arange(12).view(6, 2)
    units = Units(channels, (0, 0, 0, 1, 1, 1), 1)
    weight_RK = weight_of(5, 12)
    weight_RK[:, 6:] *= 20  # what the second pool reads matters more
    found = Problem(weight_RK, moments(12), units, DAMPING).solve(10, 10)
    assert [units.pool_U[unit] for unit in found.kept] == [0, 1]


def test_dead_inputs_go_first_and_cost_nothing() -> None:
    hessian_KK = moments(8)
    hessian_KK[[2, 5]] = 0
    hessian_KK[:, [2, 5]] = 0
    weight_RK = weight_of(5, 8)
    found = Problem(weight_RK, hessian_KK, Units.alike(8, 1, 6), DAMPING).solve(2, 5)
    assert found.kept == (0, 1, 3, 4, 6, 7)
    assert torch.allclose(found.weight_RK[:, list(found.kept)].float(), weight_RK[:, list(found.kept)], atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_overflow_are_refused(value: float) -> None:
    hessian_KK = moments(4)
    hessian_KK[1, 1] = value
    with pytest.raises(InputError, match="no finite numbers"):
        Problem(weight_of(2, 4), hessian_KK, Units.alike(4, 1, 2), DAMPING)


def test_inputs_that_are_all_zero_work() -> None:
    found = Problem(weight_of(2, 4), torch.zeros(4, 4), Units.alike(4, 1, 2), DAMPING).solve(4, 4)
    assert len(found.kept) == 2
    assert bool(found.weight_RK.isfinite().all())
