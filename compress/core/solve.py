"""The second-order solver: damping ladder, factorisation, and the column sweep that GPTQ, SparseGPT and kin share.

The layer's output error is tr(E H Eᵀ), E = W - Ŵ, H = Σ x xᵀ. GPTQ (Frantar et al., 2022, arXiv:2210.17323) rounds one
column after another and lets the later ones make up for the error. Written as LDLQ (Chee et al., 2023,
arXiv:2307.13304) it needs no inverse: with H = L Lᵀ, L lower triangular, columns are taken from the last to the first,
and column k aims at
    w_k + Σ_{j>k} e_j L[j,k] / L[k,k].
That is one Cholesky factorisation, in H's own memory; the textbook form takes two of them and an inverse.

Shape suffixes: K input channels in sweep order (the last is taken first), R rows (output channels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from compress.core.errors import InputError

LADDER_RUNGS = 4
_TILE = 1024


@dataclass(frozen=True, slots=True)
class Factor:
    """H (damped, permuted by `order_K`) = L Lᵀ, kept as unit lower triangle `feedback_KK` and the diagonal of L.

    feedback_KK[j, k] = L[j, k] / L[k, k]; diagonal_K = diag(L): 1 / diagonal_K² is the diagonal of the inverse that
    remains when columns 0 … k are still free. order_K[i] is the input channel at sweep position i.
    """

    feedback_KK: torch.Tensor
    diagonal_K: torch.Tensor
    order_K: torch.Tensor
    damping: float
    retries: int


def factorise(hessian_KK: torch.Tensor, *, damping: float = 0.01, activation_order: bool = True) -> Factor | None:
    """Factorise a Hessian (fp32, symmetric) in place: its memory becomes the factor's.

    `damping` times the mean of the diagonal is added to it; should that not be enough for a Cholesky factorisation, ten
    times as much, and so on. Returns None when even the last rung fails or H is not finite: use round-to-nearest then.
    activation_order: channels with the largest diagonal are rounded first ("static" activation order).
    """
    diagonal = hessian_KK.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()) or not bool((diagonal > 0).any()):
        return None
    mean = diagonal.mean()
    silent = diagonal <= 0  # channels that never fired: no error to make up for, any positive pivot will do
    hessian_KK.diagonal()[silent] = mean
    width = len(diagonal)
    order = torch.argsort(diagonal, stable=True) if activation_order else torch.arange(width, device=diagonal.device)
    if activation_order:
        _permute_symmetric(hessian_KK, order)
    backup = _lower_tiles(hessian_KK)
    for retries, rung in enumerate(_ladder(damping)):
        if retries:
            _restore(hessian_KK, backup)
        hessian_KK.diagonal().add_(mean * rung)
        lower_KK = _cholesky_in_place(hessian_KK)
        if lower_KK is not None:
            pivots = lower_KK.diagonal().clone()
            lower_KK /= pivots  # column k by L[k, k]
            return Factor(lower_KK, pivots, order, rung, retries)
    return None


class Rounding(Protocol):
    """How the columns of one block are rounded."""

    def round_block(self, columns: Columns, error_BR: torch.Tensor, loss_R: torch.Tensor) -> None:
        """Fill error_BR with the block's weights minus what they become, and add what that costs to loss_R."""
        ...


@dataclass(frozen=True, slots=True)
class Columns:
    """One block of columns in the midst of a sweep: B of them, taken from the last to the first.

    channel_B: the input channel of each. target_BR: what each should have now that columns of later blocks erred.
    feedback_BB[i, j]: what the error of column j > i adds to column i. cost_B: what a squared error costs.
    """

    channel_B: torch.Tensor
    original_BR: torch.Tensor
    target_BR: torch.Tensor
    feedback_BB: torch.Tensor
    cost_B: torch.Tensor


@dataclass(frozen=True, slots=True)
class ByColumn:
    """Rounds one column after another with `choose(k, target_R)`, which gets the input channel k and the value that its
    column should have, and returns what the column becomes."""

    choose: Callable[[int, torch.Tensor], torch.Tensor]

    def round_block(self, columns: Columns, error_BR: torch.Tensor, loss_R: torch.Tensor) -> None:
        for i in range(len(error_BR) - 1, -1, -1):
            target_R = torch.addmv(columns.target_BR[i], error_BR[i + 1 :].t(), columns.feedback_BB[i, i + 1 :])
            chosen_R = self.choose(int(columns.channel_B[i]), target_R)
            torch.sub(columns.original_BR[i], chosen_R, out=error_BR[i])
            residual_R = target_R.sub_(chosen_R)
            loss_R.addcmul_(residual_R, residual_R, value=float(columns.cost_B[i]))


def sweep(weight_RK: torch.Tensor, factor: Factor, rounding: Rounding, block_size: int = 128) -> torch.Tensor:
    """Replace the columns of `weight_RK` one by one; returns the weighted squared error of every row, [R].

    `weight_RK` is overwritten with the result. An error reaches columns of the same block at once, in `rounding`, and
    the others as one matrix product a block ("lazy"). Beside the weight there is one buffer of its size: weights that
    are still to come, and the errors of those that went by.
    """
    width = weight_RK.shape[1]
    left_KR = weight_RK.t()[factor.order_K].contiguous()
    loss_R = weight_RK.new_zeros(weight_RK.shape[0])
    for end in range(width, 0, -block_size):
        start = max(0, end - block_size)
        channel_B, error_BR = factor.order_K[start:end], left_KR[start:end]
        original_BR = error_BR.clone()
        target_BR = original_BR
        if end < width:
            target_BR = torch.addmm(target_BR, factor.feedback_KK[end:, start:end].t(), left_KR[end:])
        columns = Columns(
            channel_B=channel_B,
            original_BR=original_BR,
            target_BR=target_BR,
            feedback_BB=factor.feedback_KK[start:end, start:end].t().contiguous(),
            cost_B=factor.diagonal_K[start:end].square(),
        )
        rounding.round_block(columns, error_BR, loss_R)
        weight_RK.t()[channel_B] = original_BR.sub_(error_BR)
    return loss_R


def _ladder(damping: float) -> tuple[float, ...]:
    if damping <= 0:
        raise InputError(f"damping {damping} must be positive")
    return tuple(damping * 10**step for step in range(LADDER_RUNGS))


def _cholesky_in_place(hessian_KK: torch.Tensor) -> torch.Tensor | None:
    """Lower factor in the memory of `hessian_KK` (LAPACK wants columns contiguous: the transpose of a row-major H)."""
    columns_KK = hessian_KK.t()
    info = torch.empty((), dtype=torch.int32, device=hessian_KK.device)
    torch.linalg.cholesky_ex(columns_KK, out=(columns_KK, info))
    return columns_KK if int(info) == 0 else None


def _permute_symmetric(hessian_KK: torch.Tensor, order: torch.Tensor) -> None:
    """H[order][:, order] in place: columns, transpose, columns. No second K×K buffer."""
    for _ in range(2):
        for rows in hessian_KK.split(_TILE):
            rows.copy_(rows[:, order])
        _transpose_in_place(hessian_KK)


def _transpose_in_place(square_KK: torch.Tensor) -> None:
    for start in range(0, len(square_KK), _TILE):
        for other in range(start, len(square_KK), _TILE):
            tile = square_KK[start : start + _TILE, other : other + _TILE]
            mirror = square_KK[other : other + _TILE, start : start + _TILE]
            kept = tile.t().clone()
            tile.copy_(mirror.t().clone())
            mirror.copy_(kept)


def _lower_tiles(hessian_KK: torch.Tensor) -> list[torch.Tensor]:
    """The lower triangle in row tiles: half the memory of a copy."""
    size = len(hessian_KK)
    return [hessian_KK[start : start + _TILE, : start + _TILE].clone() for start in range(0, size, _TILE)]


def _restore(hessian_KK: torch.Tensor, tiles: list[torch.Tensor]) -> None:
    for start, tile in zip(range(0, len(hessian_KK), _TILE), tiles, strict=True):
        hessian_KK[start : start + _TILE, : tile.shape[1]] = tile
        hessian_KK[: tile.shape[1], start : start + _TILE] = tile.t()
