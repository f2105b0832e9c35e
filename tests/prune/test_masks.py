"""Masks: exactly as many zeros as asked for, where the scores are lowest, in the place that the pattern allows."""

from __future__ import annotations

import pytest
import torch

from prune._masks import keep
from prune._pattern import Spread, parse_pattern


def scores(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("compare", ["row", "layer"])
def test_the_lowest_scores_go(share: float, compare: str) -> None:
    score = scores(17, 60)
    kept = keep(score, share, None, compare)  # type: ignore[arg-type]
    parts = zip(score, kept, strict=True) if compare == "row" else [(score.flatten(), kept.flatten())]
    for values, stays in parts:
        assert int((~stays).sum()) == int(share * len(values) + 1e-6)
        if stays.any() and not stays.all():
            assert values[stays].min() >= values[~stays].max()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", "15:16"])
def test_of_m_neighbours_n_stay(pattern: str) -> None:
    spread = parse_pattern(pattern)
    assert spread is not None
    score = scores(7, spread.among * 6)
    kept = keep(score, 0.9, spread, "row").view(-1, spread.among)
    assert bool((kept.sum(1) == spread.kept).all())
    for values, stays in zip(score.view(-1, spread.among), kept, strict=True):
        assert values[stays].min() >= values[~stays].max()


def test_equal_scores_go_from_the_front() -> None:
    equal = torch.zeros(2, 8)
    assert keep(equal, 0.25, None, "row").tolist() == [[False] * 2 + [True] * 6] * 2
    assert keep(equal, 0.25, None, "layer").flatten().tolist() == [False] * 4 + [True] * 12
    assert keep(equal, 0.0, Spread(2, 4), "row").tolist() == [[False, False, True, True] * 2] * 2


@pytest.mark.parametrize("pattern", ["2-4", "4:2", "4:4", "0:4", "2:", "two", "2:4:8", ""])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(pattern)
