"""Which weights stay: masks from scores. Shape suffixes: R rows (output channels), K input channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prune._pattern import Spread

Compare = Literal["row", "layer"]


def keep(score_RK: Tensor, share: float, spread: Spread | None, compare: Compare) -> Tensor:
    """bool [R, K]: the weights that stay, all but `share` of each row or of the layer (rounded down, as the papers' own
    programs do), or those of the pattern.

    Weights with the lowest scores go; of equal ones those that come first.
    """
    if spread is not None:
        return keep_of_neighbours(score_RK, spread)
    if compare == "row":
        return _highest(score_RK, _whole(share * score_RK.shape[1]))
    return _highest(score_RK.reshape(1, -1), _whole(share * score_RK.numel())).view(score_RK.shape)


def keep_of_neighbours(score_RK: Tensor, spread: Spread) -> Tensor:
    """bool [R, K]: the N with the highest scores of every M neighbours."""
    rows, width = score_RK.shape
    return _highest(score_RK.reshape(-1, spread.among), spread.among - spread.kept).view(rows, width)


def _whole(weights: float) -> int:
    """Rounded down, but for what binary fractions lack: 0.29 x 100 is 29."""
    return int(weights + 1e-6)


def _highest(score_RK: Tensor, dropped: int) -> Tensor:
    """All but `dropped` elements of each row. Without a sort: the threshold, then the first of those that equal it."""
    if dropped == 0:
        return torch.ones_like(score_RK, dtype=torch.bool)
    threshold_R1 = score_RK.kthvalue(dropped, dim=1, keepdim=True).values
    kept_RK = score_RK > threshold_R1
    level_RK = score_RK == threshold_R1
    spared_R1 = score_RK.shape[1] - dropped - kept_RK.sum(1, keepdim=True)
    seen_RK = level_RK.flip(1).cumsum(1).flip(1)  # how many of the equal ones there are from here on
    return kept_RK | (level_RK & (seen_RK <= spared_R1))
