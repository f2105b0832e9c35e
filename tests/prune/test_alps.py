"""ALPS: the weights on a mask are those of least squares, and the mask is better than what a sweep finds."""

from __future__ import annotations

import pytest
import torch

from compress.core.solve import factorise, sweep
from prune._alps import Inputs, Settings, find_mask, refine, solve
from prune._masks import keep
from prune._pattern import Spread
from prune._prune import weighted
from prune._sparsegpt import Chosen
from tests.prune.test_sparsegpt import ROWS, WIDTH, problem

SETTINGS = Settings(damping=0.01, spread=None, compare="layer", iterations=300, refinements=10)


def inputs_of(hessian: torch.Tensor) -> Inputs:
    found = Inputs.of(hessian, 0.01)
    assert found is not None
    return found


def test_scaled_inputs_mean_the_same() -> None:
    _, hessian = problem()
    found = inputs_of(hessian)
    scaled = (found.vectors_KK * found.values_K) @ found.vectors_KK.T
    torch.testing.assert_close(scaled, found.hessian_KK, rtol=1e-4, atol=1e-5)
    back = found.hessian_KK * found.scale_K * found.scale_K[:, None]
    damped = hessian + torch.eye(WIDTH) * hessian.diagonal().mean() * 0.01
    torch.testing.assert_close(back, damped, rtol=1e-4, atol=1e-5)


def test_refined_weights_are_those_of_least_squares() -> None:
    weight, hessian = problem()
    scaled = inputs_of(hessian).hessian_KK
    kept = keep(weight.abs(), 0.6, None, "layer")
    found = refine(weight * kept, weight, scaled, kept, steps=60)
    assert bool((found[~kept] == 0).all())
    for row in range(ROWS):
        support = kept[row].nonzero().flatten()
        square = scaled.double()[support]
        exact = torch.linalg.solve(square[:, support], square @ weight[row].double())
        torch.testing.assert_close(found[row, support].double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("share", "spread"), [(0.6, None), (0.8, None), (0.5, Spread(2, 4)), (0.5, Spread(4, 8))])
def test_beats_the_sweep(share: float, spread: Spread | None) -> None:
    weight, hessian = problem()
    settings = Settings(0.01, spread, "layer", 300, 10)
    pruned = solve(weight, inputs_of(hessian), share, settings)
    factor = factorise(hessian.clone(), activation_order=False)
    assert factor is not None
    swept = weight.clone()
    sweep(swept, factor, Chosen(share, spread, 16 if spread is None else spread.among), 96)
    assert int((pruned == 0).sum()) >= int((swept == 0).sum())  # whose shares are rounded down run by run
    assert weighted(weight - pruned, hessian) < weighted(weight - swept, hessian)


def test_zeros_stay() -> None:
    weight, hessian = problem()
    weight[:, 7] = 0
    pruned = solve(weight, inputs_of(hessian), 0.5, SETTINGS)
    assert bool((pruned[:, 7] == 0).all())
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_a_mask_that_stays_ends_the_search() -> None:
    weight, hessian = problem()
    looks = []

    def project(score: torch.Tensor) -> torch.Tensor:
        looks.append(1)
        return keep(score, 0.5, None, "layer")

    kept, values = find_mask(weight, inputs_of(hessian), project, 300)
    assert len(looks) < 150
    assert bool((values[~kept] == 0).all()) and int(kept.sum()) == kept.numel() // 2


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_inputs_that_say_nothing(bad: torch.Tensor) -> None:
    assert Inputs.of(bad, 0.01) is None
