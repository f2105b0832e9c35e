"""Magnitude and Wanda: a score for each weight, and the lowest go."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from compress.core.statistics import SquaredMean
from compress.core.walk import Group, Site
from prune._masks import keep
from prune._pattern import Spread
from prune._prune import put, relative_loss


def score(weight_RK: Tensor, square_K: Tensor | None) -> Tensor:
    """|w| times the norm of its input, [R, K]; |w| where nothing is known of inputs, or they were all zero."""
    return weight_RK.abs() if square_K is None or not bool(square_K.any()) else weight_RK.abs() * square_K.sqrt()


def prune_by_score(
    site: Site, group: Group | None, share: float, spread: Spread | None, compare: Literal["row", "layer", "global"]
) -> None:
    """Set the weights with the lowest scores to zero; `group` (None: magnitudes alone) has the inputs' squares."""
    weight_RK = site.weight
    score_RK = score(weight_RK, None if group is None else group.statistics[SquaredMean])
    kept_RK = keep(score_RK, share, spread, "row" if compare == "row" else "layer")
    method, tokens = ("magnitude", 0) if group is None else ("wanda", group.tokens)
    error = relative_loss(score_RK, kept_RK)
    put(site, weight_RK.masked_fill_(~kept_RK, 0), method=method, error=error, tokens=tokens)
