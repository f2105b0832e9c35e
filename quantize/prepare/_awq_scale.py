"""The search for AWQ's scales. Shape suffixes: R sampled rows, K input channels, C scales of a fold.

A candidate is s = x^a, or s = x^a / w^(1 - a) (x: root mean square of a channel's inputs, w: mean size of its weights
within their quantization groups). It is judged by the error of the layers' outputs, tr(E H Eᵀ) with E = round(W s)/s
- W, relative to the outputs: the Hessian H stands for all calibration tokens, so no sample of them is needed. Rows are
independent, so some of them are enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.folds import Fold, folds_of
from compress.core.grid import Clip, fit_grid
from compress.core.scheme import Scheme
from compress.core.statistics import Hessian
from compress.core.walk import Block, Group, Site
from quantize.prepare._exponents import least
from quantize.prepare._transform import Target

_PRODUCTS = 1 << 31  # multiplications that judging one candidate may take: it bounds the rows
_FEWEST_ROWS, _MOST_ROWS = 32, 1024
_CLIP = Clip(steps=4, refinements=0)  # candidates are told apart with fewer spans than the final search has


@dataclass(frozen=True, slots=True)
class _Layer:
    """Some rows of a layer that will be quantized, and the curvature of its inputs: [K, K], or its diagonal [K]."""

    weight_RK: Tensor
    curvature: Tensor
    scheme: Scheme
    power: float

    def error(self, scale_K: Tensor, clip: Clip | None, scale_dtype: torch.dtype) -> float:
        """Output error with these scales, relative to the outputs."""
        scaled_RK = self.weight_RK * scale_K
        importance_K = self._diagonal() / scale_K.square()
        grid = fit_grid(scaled_RK, self.scheme, scale_dtype=scale_dtype, clip=clip, importance_K=importance_K)
        error_RK = grid.round(scaled_RK).dequantize(torch.float32).div_(scale_K).sub_(self.weight_RK)
        return _quadratic(error_RK, self.curvature) / self.power

    def _diagonal(self) -> Tensor:
        return self.curvature if self.curvature.ndim == 1 else self.curvature.diagonal()


def scale_block(block: Block, target: Target, steps: int) -> None:
    """Fold the best scales into a block."""
    for fold in folds_of(block, target.checkpoint):
        scale_C = best_scale(fold, target, steps)
        if scale_C is not None:
            fold.divide_inputs(scale_C)


def best_scale(fold: Fold, target: Target, steps: int) -> Tensor | None:
    """The scales [C] with the least output error; None if no candidate beats leaving the weights alone."""
    layers, power_K, size_K = _read(fold, target)
    if not layers:
        return None
    clip = None if target.clip is None else _CLIP
    scale_dtype = target.checkpoint.dtype
    inputs_C = fold.mean(power_K).sqrt()
    sizes_C = fold.mean(size_K)
    lowest = _error(layers, torch.ones_like(power_K), clip, scale_dtype)
    best_C: Tensor | None = None
    for weights_C in (None, sizes_C):

        def error(step: int, weights_C: Tensor | None = weights_C) -> float:
            return _error(layers, fold.spread(candidate(inputs_C, weights_C, step / steps)), clip, scale_dtype)

        best, lowest = least(steps, error, lowest)
        if best is not None:
            best_C = candidate(inputs_C, weights_C, best / steps)
    return best_C


def candidate(inputs_C: Tensor, sizes_C: Tensor | None, exponent: float) -> Tensor:
    """Scales around 1; channels without inputs or weights are left alone."""
    alive_C = inputs_C > 0 if sizes_C is None else (inputs_C > 0) & (sizes_C > 0)
    if not alive_C.any():
        return torch.ones_like(inputs_C)
    scale_C = torch.where(alive_C, inputs_C, 1.0).pow(exponent)
    if sizes_C is not None:
        scale_C = scale_C / torch.where(alive_C, sizes_C, 1.0).pow(1 - exponent)
    alive = scale_C[alive_C]
    scale_C = (scale_C / (alive.max() * alive.min()).sqrt()).clamp(1e-4, 1e4)
    return torch.where(alive_C, scale_C, 1.0)


def _read(fold: Fold, target: Target) -> tuple[list[_Layer], Tensor, Tensor]:
    """The fold's layers that will be quantized, the mean square of their inputs [K] and the mean relative size of their
    weights [K]. Of routed groups only the diagonal of the curvature is kept, and the group's statistics are let go."""
    layers: list[_Layer] = []
    width = fold.groups[0].width
    power_K, size_K = torch.zeros(width), torch.zeros(width)
    tokens = rows = 0
    sites = sum(len(group.sites) for group in fold.groups)
    many = len(fold.groups) > 1
    most = min(_MOST_ROWS, max(_FEWEST_ROWS, _PRODUCTS // (width if many else width * width) // sites))
    for group in fold.groups:
        chosen = [(site, scheme) for site in group.sites if (scheme := target.scheme_for(site.name, width)) is not None]
        if not chosen or not group.tokens:
            continue
        curvature = group.statistics[Hessian]
        diagonal_K = curvature.diagonal().clone()
        power_K = power_K.to(diagonal_K.device) + diagonal_K * group.tokens
        tokens += group.tokens
        for site, scheme in chosen:
            layers.append(_layer(site, scheme, diagonal_K if many else curvature, most))
            size_K = size_K.to(diagonal_K.device) + relative_size(site.weight, scheme)
            rows += site.shape[0]
        if many:
            _let_go(group)
    return layers, power_K / max(tokens, 1), size_K / max(rows, 1)


def _let_go(group: Group) -> None:
    if group.routed:
        group.forget()


def _layer(site: Site, scheme: Scheme, curvature: Tensor, most: int) -> _Layer:
    weight_RK = site.rows(slice(None, None, max(1, site.shape[0] // most)))
    return _Layer(weight_RK, curvature, scheme, max(_quadratic(weight_RK, curvature), 1e-30))


def relative_size(weight_OK: Tensor, scheme: Scheme) -> Tensor:
    """Sum over the rows of |w| as part of the largest in its quantization group [K]."""
    width = weight_OK.shape[1]
    size = scheme.group_width(width)
    missing = -width % size
    groups_OGS = torch.nn.functional.pad(weight_OK.abs(), (0, missing)).view(len(weight_OK), -1, size)
    relative = groups_OGS / groups_OGS.amax(-1, keepdim=True).clamp(min=1e-30)
    return relative.view(len(weight_OK), -1)[:, :width].sum(0)


def _error(layers: list[_Layer], scale_K: Tensor, clip: Clip | None, scale_dtype: torch.dtype) -> float:
    return sum(layer.error(scale_K, clip, scale_dtype) for layer in layers)


def _quadratic(rows_RK: Tensor, curvature: Tensor) -> float:
    """tr(E C Eᵀ)."""
    if curvature.ndim == 1:
        return float((rows_RK.square() @ curvature).sum())
    return float(((rows_RK @ curvature) * rows_RK).sum())
