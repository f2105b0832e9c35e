"""SparseGPT's sweep against the textbook form, column by column with an explicit inverse."""

from __future__ import annotations

import pytest
import torch

from compress.core.solve import factorise, sweep
from prune._pattern import Spread
from prune._prune import weighted
from prune._sparsegpt import Chosen

WIDTH, ROWS = 96, 24


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * 0.1 + torch.eye(WIDTH)
    x_NK = torch.randn(400, WIDTH, generator=generator) @ mix
    return torch.randn(ROWS, WIDTH, generator=generator), x_NK.T @ x_NK / 400


def textbook(weight: torch.Tensor, hessian: torch.Tensor, share: float, spread: Spread | None, block: int):
    """Algorithm 1 of arXiv:2301.00774 in fp64; columns are taken from the last to the first, as ours are."""
    reversed_weight = weight.double().flip(1).clone()
    damped = hessian.double() + torch.eye(WIDTH) * hessian.diagonal().mean() * 0.01
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.flip(0, 1)), upper=True)
    stays = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    run = block if spread is None else spread.among
    for start in range(0, WIDTH, run):
        columns = slice(start, start + run)
        cost = reversed_weight[:, columns].square() / upper.diagonal()[columns].square()
        if spread is None:
            lowest = cost.flatten().argsort()[: int(share * cost.numel())]
            mask = torch.ones(cost.numel(), dtype=torch.bool)
            mask[lowest] = False
            stays[:, columns] = mask.view(cost.shape)
        else:
            order = cost.argsort(1)
            stays[:, columns] = torch.ones_like(cost, dtype=torch.bool).scatter_(
                1, order[:, : spread.among - spread.kept], False
            )
        for i in range(start, start + run):
            error = torch.where(stays[:, i], 0, reversed_weight[:, i]) / upper[i, i]
            reversed_weight[:, i] = torch.where(stays[:, i], reversed_weight[:, i], 0)
            reversed_weight[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return reversed_weight.flip(1).float()


@pytest.mark.parametrize(("share", "spread"), [(0.5, None), (0.7, None), (0, Spread(2, 4)), (0, Spread(3, 8))])
def test_equals_the_textbook(share: float, spread: Spread | None) -> None:
    weight, hessian = problem()
    block = 48 if spread is None else spread.among * (48 // spread.among)
    expected = textbook(weight, hessian, share, spread, block)
    factor = factorise(hessian.clone(), activation_order=False)
    assert factor is not None
    pruned = weight.clone()
    loss = sweep(pruned, factor, Chosen(share, spread, block if spread is None else spread.among), block)
    torch.testing.assert_close(pruned, expected, rtol=1e-3, atol=1e-4)
    damped = hessian + torch.eye(WIDTH) * hessian.diagonal().mean() * 0.01
    assert float(loss.sum()) == pytest.approx(weighted(weight - pruned, damped), rel=1e-3)


@pytest.mark.parametrize("at_once", [16, 48, 96])
def test_what_is_swept_at_once_changes_nothing(at_once: int) -> None:
    weight, hessian = problem()
    factor = factorise(hessian.clone(), activation_order=False)
    assert factor is not None
    expected = weight.clone()
    sweep(expected, factor, Chosen(0.5, None, 16), 16)
    sweep(weight, factor, Chosen(0.5, None, 16), at_once)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_zeros_stay_and_count() -> None:
    weight, hessian = problem()
    weight[torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)) < 0.3] = 0
    factor = factorise(hessian.clone(), activation_order=False)
    assert factor is not None
    pruned = weight.clone()
    sweep(pruned, factor, Chosen(0.5, None, 48), 48)
    assert bool((pruned[weight == 0] == 0).all())
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_what_is_left_makes_up_for_what_went() -> None:
    weight, hessian = problem()
    factor = factorise(hessian.clone(), activation_order=False)
    assert factor is not None
    pruned = weight.clone()
    sweep(pruned, factor, Chosen(0.5, None, 16), 96)
    assert weighted(weight - pruned, hessian) < 0.9 * weighted(weight * (pruned == 0), hessian)
