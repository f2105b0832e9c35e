"""HQQ's maths: half-quadratic splitting of Σ|w - ŵ|ᵖ. Shape suffixes: O outputs, K inputs, G groups, S channels of one.

With e standing for the error, Σ|e|ᵖ + β/2 (w - ŵ - e)² is minimised by turns: over e by a shrinkage that keeps large
errors and forgets small ones, over the grid by least squares on what is left. All in units of the group's scale, so
that β means the same for every layer (the original takes it in units of the weights).
"""

import torch

from compress.core.grid import Grid, fit_grid
from compress.core.scheme import Scheme
from compress.core.walk import Site
from quantize._rounding import CLIPS

BETA, BETA_GROWTH = 1.0, 1.05
_CACHED_WEIGHTS = 1 << 18  # rows are solved in pieces that stay in the cache


def solve_site(site: Site, scheme: Scheme, scale_dtype: torch.dtype, clip: str, norm: float, iterations: int) -> None:
    """Replace a site's weight by its nearest codes on the half-quadratic grid, which starts at that of `clip`."""
    weight_OK = site.weight
    start = fit_grid(weight_OK, scheme, scale_dtype=scale_dtype, clip=CLIPS[clip])
    tensor = half_quadratic(weight_OK, start, norm=norm, iterations=iterations).round(weight_OK)
    error = tensor.dequantize().sub_(weight_OK).square_().sum() / weight_OK.square().sum().clamp(min=1e-30)
    site.replace(tensor)
    site.note(method="hqq", bits=scheme.bits, group_size=scheme.group_size, error=float(error))


def half_quadratic(weight_OK: torch.Tensor, start: Grid, *, norm: float = 0.7, iterations: int = 20) -> Grid:
    """The grid with the least Σ|w - ŵ|ᵖ per group that `iterations` rounds from `start` find; never a worse one.

    Zero points are real numbers for the first half of the rounds (asymmetric schemes), whole ones afterwards, while
    scales go on to be solved for. weight_OK: fp32, its width a multiple of the group size.
    """
    rows = max(1, _CACHED_WEIGHTS // weight_OK.shape[1])
    parts = []
    for first in range(0, len(weight_OK), rows):
        piece = slice(first, first + rows)
        zero = None if start.zero is None else start.zero[piece]
        descent = _Descent(weight_OK[piece], Grid(start.scale[piece], zero, start.scheme), norm)
        parts.append(descent.run(iterations))
    zeros = [zero for _, zero in parts if zero is not None]
    return Grid(torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None, start.scheme)


class _Descent:
    """Scales and zero points of some rows on their way, and the best so far of every group."""

    def __init__(self, weight_OK: torch.Tensor, start: Grid, norm: float) -> None:
        groups = start.scale.shape[1]
        self.weight_OGS = weight_OK.unflatten(1, (groups, -1))
        self.scheme, self.norm, self.dtype = start.scheme, norm, start.scale.dtype
        self.scale = start.scale.float()[..., None]
        self.zero = torch.zeros_like(self.scale) if start.zero is None else start.zero.float()[..., None]
        self.best_error = torch.full_like(self.scale, torch.inf)
        self.best_scale, self.best_zero = self.scale, self.zero

    def run(self, iterations: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale [O, G] in its storage dtype, zero point int8 [O, G] or None."""
        beta, whole_from = BETA, 0 if self.scheme.symmetric else iterations // 2
        self._judge(self._round()[1])
        for round_ in range(iterations):
            code, residual = self._round()
            rest = residual - shrink(residual, beta, self.norm)
            if round_ < whole_from:
                self.zero = self.zero - rest.mean(-1, keepdim=True)
            else:
                if round_ == whole_from and not self.scheme.symmetric:
                    self.zero = self.zero.round().clamp_(self.scheme.lowest, self.scheme.highest)
                    code, residual = self._round()
                    rest = residual - shrink(residual, beta, self.norm)
                self._solve_scale(code.sub_(self.zero), rest)
                self._judge(self._round()[1])
            beta *= BETA_GROWTH
        zero = None if self.scheme.symmetric else self.best_zero[..., 0].to(torch.int8)
        return self.best_scale[..., 0].to(self.dtype), zero

    def _round(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, and how far weights are from them, in steps of the grid."""
        exact = self.weight_OGS / self.scale + self.zero
        code = exact.round().clamp_(self.scheme.lowest, self.scheme.highest)
        return code, exact.sub_(code)

    def _solve_scale(self, level: torch.Tensor, rest: torch.Tensor) -> None:
        """Least squares on w = scale · level, less the errors that were set aside."""
        change = (rest * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True).clamp_(min=1)
        scale = (self.scale * (1 + change)).to(self.dtype).float()
        self.scale = torch.where(scale.isfinite() & (scale != 0), scale, self.scale)

    def _judge(self, residual: torch.Tensor) -> None:
        error = (residual.abs_().pow_(self.norm)).sum(-1, keepdim=True) * self.scale.abs() ** self.norm
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best_scale = torch.where(better, self.scale, self.best_scale)
        self.best_zero = torch.where(better, self.zero, self.best_zero)


def shrink(residual: torch.Tensor, beta: float, norm: float) -> torch.Tensor:
    """The minimiser over e of |e|ᵖ + β/2 (r - e)², generalised soft-thresholding."""
    size = residual.abs()
    kept = size - size.clamp(min=1e-8).pow(norm - 1) / beta
    return kept.clamp_(min=0).copysign_(residual)
