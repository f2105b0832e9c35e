"""The 0-1 knapsack with several choices of each item, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence

_TINY = 1e-30


def knapsack(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The choice of each item with the least total loss whose sizes fit the budget (HiGHS); None if none fits.

    `losses` and `sizes` hold, for each item, those of its choices.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    every_loss = np.array([loss for choices in losses for loss in choices])
    every_size = np.array([size for choices in sizes for size in choices], dtype=float)
    owner = np.array([number for number, choices in enumerate(losses) for _ in choices])
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    result = milp(
        every_loss / max(every_loss.max(), _TINY),
        integrality=np.ones(len(every_loss)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(every_size[None] / budget, -np.inf, 1),
        ],
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        return None
    first = np.searchsorted(owner, np.arange(len(losses)))
    return [int(place - first[owner[place]]) for place in np.flatnonzero(result.x > 0.5)]
