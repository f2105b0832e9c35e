"""OSSCAR (Meng et al., 2024, arXiv:2403.12983): which groups of a layer's inputs go, and what the others become.

The layer's output error is tr((W - Ŵ) G (W - Ŵ)ᵀ), G = Σ x xᵀ, damped; Ŵ has columns of kept units only. With B = W G
the best Ŵ for the kept columns S is B_S G_SS⁻¹. Units are eliminated where that costs least, round by round: their cost
is tr(Ŵ_u (Q_uu)⁻¹ Ŵ_uᵀ) with Q = G_SS⁻¹, which a Woodbury downdate carries on. Then as many units as still pays are
swapped. All of it runs in fp64.

Shape suffixes: R rows (output channels), K input channels, U units, C channels of a unit, S channels that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.errors import InputError
from prune._units import Units

_LADDER = (1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True, slots=True)
class Selection:
    """Units that stay, ascending, the weight fp64 [R, K] with zeros for the others, and its relative output error."""

    kept: tuple[int, ...]
    weight_RK: Tensor
    error: float


class Problem:
    """One layer: its weight fp32 [R, K], the second moments of its input [K, K] and how its inputs make units."""

    def __init__(self, weight_RK: Tensor, hessian_KK: Tensor, units: Units, damping: float) -> None:
        self.units = units
        self._weight_RK = weight_RK.double()
        self.moments_KK = hessian_KK.double()
        diagonal_K = self.moments_KK.diagonal()
        mean = float(diagonal_K.mean())
        if not torch.isfinite(diagonal_K).all():
            raise InputError("the second moments of a layer's inputs are no finite numbers")
        diagonal_K += damping * mean if mean > 0 else 1.0
        self.aim_RK = self._weight_RK @ self.moments_KK
        self._power = float((self.aim_RK * self._weight_RK).sum())

    def solve(self, rounds: int, swaps: int) -> Selection:
        """Eliminate in at most `rounds` rounds, then try to swap at most `swaps` times."""
        kept = eliminate(self, rounds)
        weight_RK, loss = self.fit(kept)
        batch = min(len(kept), self.units.count - len(kept)) // 4 + 1
        for _ in range(swaps):
            other = swapped(self, kept, batch)
            other_RK, other_loss = (weight_RK, loss) if other is None else self.fit(other)
            if other is not None and other_loss < loss * (1 - 1e-9):
                kept, weight_RK, loss = other, other_RK, other_loss
            elif batch == 1:
                break
            else:
                batch //= 2
        return Selection(tuple(kept), weight_RK, max(loss, 0.0) / max(self._power, 1e-300))

    def within(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The best weight [R, S] for these units' channels alone, and the inverse [S, S] of their moments."""
        index_S = self.units.channels(kept)
        inverse_SS = torch.cholesky_inverse(_cholesky(self.moments_KK[index_S][:, index_S]))
        return self.aim_RK[:, index_S] @ inverse_SS, inverse_SS

    def fit(self, kept: Sequence[int]) -> tuple[Tensor, float]:
        """The best weight [R, K] with columns of these units only, and its error."""
        index_S = self.units.channels(kept)
        lower_SS = _cholesky(self.moments_KK[index_S][:, index_S])
        found_RS = torch.cholesky_solve(self.aim_RK[:, index_S].t(), lower_SS).t()
        weight_RK = torch.zeros_like(self._weight_RK)
        weight_RK[:, index_S] = found_RS
        return weight_RK, self._power - float((found_RS * self.aim_RK[:, index_S]).sum())


def eliminate(problem: Problem, rounds: int) -> list[int]:
    """Backward elimination: the units that stay."""
    units = problem.units
    inverse_KK = torch.cholesky_inverse(_cholesky(problem.moments_KK))
    weight_RK = problem._weight_RK.clone()
    kept = list(range(units.count))
    for left in range(rounds, 0, -1):
        over = len(kept) - units.keep
        if over == 0:
            break
        cost_U = removal_costs(weight_RK, inverse_KK, units, kept)
        gone = units.lowest(cost_U, kept, -(-over // left))
        downdate(weight_RK, inverse_KK, units.channels(gone))
        kept = [unit for unit in kept if unit not in set(gone)]
    return kept


def removal_costs(weight_RK: Tensor, inverse_KK: Tensor, units: Units, kept: Sequence[int]) -> Tensor:
    """tr(Ŵ_u (Q_uu)⁻¹ Ŵ_uᵀ) of each unit in `kept`, [len(kept)]."""
    columns_UC = units.columns_UC[list(kept)]
    if columns_UC.shape[1] == 1:
        column_U = columns_UC[:, 0]
        return weight_RK[:, column_U].square().sum(0) / inverse_KK.diagonal()[column_U]
    own_UCC = inverse_KK[columns_UC[:, :, None], columns_UC[:, None, :]]
    weight_UCR = weight_RK.t()[columns_UC]
    return (torch.linalg.solve(own_UCC, weight_UCR) * weight_UCR).sum((1, 2))


def downdate(weight_RK: Tensor, inverse_KK: Tensor, gone_G: Tensor) -> None:
    """Take channels out of the problem: the weight becomes the best without them, Q the inverse of what is left.

    Rows and columns of channels that are gone are zero from then on.
    """
    own_GG = inverse_KK[gone_G][:, gone_G]
    reach_GK = torch.linalg.solve(own_GG, inverse_KK[gone_G])
    weight_RK -= weight_RK[:, gone_G] @ reach_GK
    inverse_KK -= inverse_KK[:, gone_G] @ reach_GK
    weight_RK[:, gone_G] = 0
    inverse_KK[gone_G] = 0
    inverse_KK[:, gone_G] = 0


def swapped(problem: Problem, kept: Sequence[int], batch: int) -> list[int] | None:
    """`kept` with the `batch` units from outside that help most, and without as many that cost least then; None if
    that changes nothing."""
    units = problem.units
    outside = sorted(set(range(units.count)) - set(kept))
    if not outside:
        return None
    gain_U = insertion_gains(problem, kept, outside)
    back = [outside[place] for place in torch.argsort(-gain_U, stable=True)[:batch].tolist()]
    more = sorted([*kept, *back])
    weight_RS, inverse_SS = problem.within(more)
    cost_U = removal_costs(weight_RS, inverse_SS, units.within(more), range(len(more)))
    gone = units.lowest(cost_U, more, len(back))
    found = sorted(set(more) - set(gone))
    return found if found != list(kept) else None


def insertion_gains(problem: Problem, kept: Sequence[int], outside: Sequence[int]) -> Tensor:
    """By how much the error falls when one unit of `outside` joins those that stay, [len(outside)]."""
    moments_KK = problem.moments_KK
    index_S = problem.units.channels(kept)
    weight_RS, inverse_SS = problem.within(kept)
    columns_UC = problem.units.columns_UC[list(outside)]
    index_O = columns_UC.flatten()
    cross_SO = moments_KK[index_S][:, index_O]
    left_RO = problem.aim_RK[:, index_O] - weight_RS @ cross_SO
    reach_SO = inverse_SS @ cross_SO
    units, size = columns_UC.shape
    own_UCC = moments_KK[columns_UC[:, :, None], columns_UC[:, None, :]]
    reach_USC = reach_SO.view(-1, units, size).transpose(0, 1)
    cross_USC = cross_SO.view(-1, units, size).transpose(0, 1)
    schur_UCC = own_UCC - cross_USC.transpose(1, 2) @ reach_USC
    left_UCR = left_RO.view(-1, units, size).permute(1, 2, 0)
    return (torch.linalg.solve(schur_UCC, left_UCR) * left_UCR).sum((1, 2))


def _cholesky(moments_KK: Tensor) -> Tensor:
    """The lower factor; with more on the diagonal where rounding made it necessary."""
    lower_KK, info = torch.linalg.cholesky_ex(moments_KK)
    for factor in _LADDER:
        if int(info) == 0:
            return lower_KK
        more = 1e-6 * factor * moments_KK.diagonal().mean()
        lower_KK, info = torch.linalg.cholesky_ex(moments_KK + more * torch.eye(len(moments_KK)).to(moments_KK))
    raise InputError("the second moments of a layer's inputs cannot be factorised", hint="raise damping")
