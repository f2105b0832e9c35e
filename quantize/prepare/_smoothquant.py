"""SmoothQuant's maths. Shape suffixes: N sampled tokens, O output channels, K input channels, C scales of a fold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.core.folds import Fold, folds_of
from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from compress.core.statistics import AbsMax, Sample
from compress.core.walk import Block
from quantize.prepare._transform import Target


def smooth_block(block: Block, target: Target, alpha: float | Literal["auto"], steps: int) -> None:
    """Smooth the inputs of a block's layers."""
    for fold in folds_of(block, target.checkpoint):
        width = fold.groups[0].width
        schemes = [target.scheme_for(site.name, width) for group in fold.groups for site in group.sites]
        if not any(schemes) or not any(group.tokens for group in fold.groups):
            continue
        inputs_C, weights_C = _largest(fold)
        if alpha == "auto":
            scale_C = _searched(fold, target, inputs_C, weights_C, steps)
        else:
            scale_C = smoothing(inputs_C, weights_C, alpha)
        if scale_C is not None:
            fold.divide_inputs(scale_C)


def smoothing(inputs_C: Tensor, weights_C: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) per channel, around 1; dead channels are left alone."""
    alive_C = (inputs_C > 0) & (weights_C > 0)
    if not alive_C.any():
        return torch.ones_like(inputs_C)
    scale_C = torch.where(alive_C, inputs_C, 1.0).pow(alpha) / torch.where(alive_C, weights_C, 1.0).pow(1 - alpha)
    alive = scale_C[alive_C]
    return torch.where(alive_C, scale_C / (alive.max() * alive.min()).sqrt(), 1.0).clamp(1e-4, 1e4)


def _largest(fold: Fold) -> tuple[Tensor, Tensor]:
    """The largest |input| and the largest |weight| of each channel [C], over all layers that read it."""
    inputs_K, weights_K = torch.zeros(fold.groups[0].width), torch.zeros(fold.groups[0].width)
    for group in fold.groups:
        if group.tokens:
            seen_K = group.statistics[AbsMax]
            inputs_K = torch.maximum(inputs_K.to(seen_K.device), seen_K)
        for site in group.sites:
            largest_K = site.weight.abs().amax(0)
            weights_K = torch.maximum(weights_K.to(largest_K.device), largest_K)
    return fold.largest(inputs_K), fold.largest(weights_K)


def _searched(fold: Fold, target: Target, inputs_C: Tensor, weights_C: Tensor, steps: int) -> Tensor | None:
    """The scales with the least output error; None if none beats leaving everything as it is."""
    best_C: Tensor | None = None
    least = _error(fold, target, torch.ones_like(fold.spread(inputs_C)))
    for step in range(steps + 1):
        scale_C = smoothing(inputs_C, weights_C, step / steps)
        error = _error(fold, target, fold.spread(scale_C))
        if error < least:
            best_C, least = scale_C, error
    return best_C


def _error(fold: Fold, target: Target, scale_K: Tensor) -> float:
    """Squared error of the outputs with inputs and weights rounded, relative to the outputs, summed over the layers."""
    total = 0.0
    for group in fold.groups:
        if not group.tokens:
            continue
        x_NK = group.statistics[Sample]
        largest = (group.statistics[AbsMax] / scale_K).max()
        for site in group.sites:
            scheme = target.scheme_for(site.name, group.width)
            if scheme is not None:
                rounded_NK = rounded_inputs(x_NK / scale_K, largest if scheme.static_inputs else None)
                total += _relative_error(site.weight, x_NK, rounded_NK, scale_K, scheme, target)
    return total


def _relative_error(
    weight_OK: Tensor, x_NK: Tensor, rounded_NK: Tensor, scale_K: Tensor, scheme: Scheme, target: Target
) -> float:
    scaled_OK = weight_OK * scale_K
    grid = fit_grid(scaled_OK, scheme, scale_dtype=target.checkpoint.dtype)
    y_NO = x_NK @ weight_OK.T
    wrong_NO = rounded_NK @ grid.round(scaled_OK).dequantize(torch.float32).T - y_NO
    return float(wrong_NO.square().sum() / y_NO.square().sum().clamp(min=1e-30))


def rounded_inputs(x_NK: Tensor, largest: Tensor | None = None) -> Tensor:
    """Inputs as an engine rounds them while it runs: 8 bits, one symmetric scale per token, or for all tokens one that
    reaches to `largest`."""
    scale_N1 = ((x_NK.abs().amax(1, keepdim=True) if largest is None else largest) / 127).clamp(min=1e-30)
    return (x_NK / scale_N1).round_().clamp_(-128, 127).mul_(scale_N1)
