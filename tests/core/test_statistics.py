"""Statistics equal their definitions, whatever the tiles and the batches."""

from __future__ import annotations

import pytest
import torch

from compress.core import statistics
from compress.core.statistics import AbsMax, Hessian, SquaredMean


def inputs(rows: int = 37, width: int = 21) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tile", [4, 7, 21, 64])
def test_hessian_is_the_mean_outer_product_whatever_the_tile(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(statistics, "TILE", tile)
    x_NK = inputs()
    hessian = Hessian(21)
    for part in x_NK.split(10):
        hessian.update(part)
    expected = (x_NK.double().T @ x_NK.double() / 37).float()
    found = hessian.result()
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, found.T)
    assert hessian.tokens == 37
    assert hessian.result().data_ptr() == found.data_ptr()
    torch.testing.assert_close(hessian.result(), expected)


def test_hessian_is_held_once() -> None:
    assert Hessian.bytes_for(100) == 4 * 100 * 100
    hessian = Hessian(64)
    hessian.update(inputs(8, 64))
    assert hessian.result().untyped_storage().nbytes() == Hessian.bytes_for(64)


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    x_NK = inputs(2000, 8).to(torch.bfloat16)
    hessian = Hessian(8)
    hessian.update(x_NK)
    expected = x_NK.double().T @ x_NK.double() / 2000
    torch.testing.assert_close(hessian.result().double(), expected, atol=1e-6, rtol=1e-5)


def test_channel_statistics() -> None:
    x_NK = inputs()
    largest, squares = AbsMax(21), SquaredMean(21)
    for part in x_NK.split(10):
        largest.update(part)
        squares.update(part)
    assert torch.equal(largest.result(), x_NK.abs().amax(0))
    torch.testing.assert_close(squares.result(), x_NK.square().mean(0))


def test_nothing_seen_gives_zeros() -> None:
    for kind in (Hessian, AbsMax, SquaredMean):
        statistic = kind(4)
        statistic.update(torch.empty(0, 4))
        assert statistic.tokens == 0
        assert not statistic.result().any()
