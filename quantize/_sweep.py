"""GPTQ's sweep on a grid: codes of whole rows, those of floats as they are stored.

Shape suffixes: R rows, K input channels, G groups, B of a block.
"""

from collections.abc import Callable

import torch

from compress.core import gpu, native
from compress.core.grid import Grid
from compress.core.levels import e2m1_codes, nearest_e2m1
from compress.core.scheme import OWN_GROUPS
from compress.core.solve import ByColumn, Columns, Factor, sweep


def quantize_rows(
    weight_RK: torch.Tensor, grid: Grid, factor: Factor, *, keep_zeros: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [R, K] of the sweep over `weight_RK` (overwritten), and each row's weighted squared error [R].
    keep_zeros: weights that are zero stay zero."""
    rounding = _Codes(weight_RK, grid, keep_zeros)
    loss_R = sweep(weight_RK, factor, rounding)
    return rounding.codes_KR.t().contiguous(), loss_R


class _Codes:
    """Rounds to a grid, and keeps the codes: int8 [K, R]."""

    def __init__(self, weight_RK: torch.Tensor, grid: Grid, keep_zeros: bool) -> None:
        rows, width = weight_RK.shape
        self.scale_GR = grid.unit.t().contiguous()
        self.zero_GR = None if grid.zero is None else grid.zero.float().t().contiguous()
        self.codes_KR = torch.empty((width, rows), dtype=torch.int8, device=weight_RK.device)
        self._scheme = grid.scheme
        self._size = grid.scheme.group_width(width)
        self._inverse_GR = 1 / self.scale_GR
        self._floats = grid.scheme.dtype in OWN_GROUPS
        self._kernel = _kernel_for(weight_RK)
        self._weight_RK, self._keep_zeros = weight_RK, keep_zeros

    def round_block(self, columns: Columns, error_BR: torch.Tensor, loss_R: torch.Tensor) -> None:
        if self._kernel is None:
            return ByColumn(self._choose).round_block(columns, error_BR, loss_R)
        return self._kernel(
            target_BR=columns.target_BR,
            original_BR=columns.original_BR,
            feedback_BB=columns.feedback_BB,
            scale_GR=self.scale_GR,
            zero_GR=self.zero_GR,
            group_B=columns.channel_B // self._size,
            channel_B=columns.channel_B,
            cost_B=columns.cost_B,
            levels=None if self._floats else (self._scheme.lowest, self._scheme.highest),
            error_BR=error_BR,
            codes_KR=self.codes_KR,
            loss_R=loss_R,
            keep_zeros=self._keep_zeros,
        )

    def _choose(self, k: int, target_R: torch.Tensor) -> torch.Tensor:
        g = k // self._size
        exact_R = target_R * self._inverse_GR[g]
        if self._keep_zeros:
            exact_R[self._weight_RK[:, k] == 0] = 0
        if self._floats:
            level_R = nearest_e2m1(exact_R)
            self.codes_KR[k] = e2m1_codes(level_R).view(torch.int8)
            return level_R.mul_(self.scale_GR[g])
        code_R = exact_R.round_()
        if self.zero_GR is None:
            self.codes_KR[k] = code_R.clamp_(self._scheme.lowest, self._scheme.highest)
        else:
            self.codes_KR[k] = code_R.add_(self.zero_GR[g]).clamp_(self._scheme.lowest, self._scheme.highest)
            code_R.sub_(self.zero_GR[g])
        return code_R.mul_(self.scale_GR[g])


def _kernel_for(weight: torch.Tensor) -> Callable[..., None] | None:
    """What sweeps a block of columns where `weight` lies; None: torch, column by column."""
    if native.serves(weight):
        return native.sweep_block
    if gpu.serves(weight):
        from compress.core.gpu.sweep import sweep_block

        return sweep_block
    return None
