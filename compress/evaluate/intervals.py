"""Intervals: the paired bootstrap. Original and artifact saw the same documents, so documents are drawn in pairs.

Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 50

Statistic = Callable[[np.ndarray], np.ndarray]


def interval(statistic: Statistic, units: int, *, seed: int) -> tuple[float, float] | None:
    """The 95 % interval of `statistic` over `units` documents, None if there are too few to draw from.

    `statistic` takes how often each unit was drawn, [resamples, units], and gives one figure per resample. The same
    seed draws the same documents, whatever is measured on them.
    """
    if units < 2:
        return None
    low, high = np.quantile(_resampled(statistic, units, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def spread(statistic: Statistic, units: int, *, seed: int) -> float | None:
    """The standard error of `statistic`: its spread over the resamples."""
    return None if units < 2 else float(np.std(_resampled(statistic, units, seed), ddof=1))


def _resampled(statistic: Statistic, units: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    shares = np.full(units, 1 / units)
    draws = (generator.multinomial(units, shares, size=_CHUNK) for _ in range(RESAMPLES // _CHUNK))
    return np.concatenate([statistic(drawn.astype(np.float64)) for drawn in draws])


def ratio(numerator_U: np.ndarray, denominator_U: np.ndarray) -> Statistic:
    """The statistic Σ numerator / Σ denominator over the units drawn."""
    return lambda drawn_BU: (drawn_BU @ numerator_U) / (drawn_BU @ denominator_U)
