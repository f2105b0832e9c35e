"""SmoothQuant's maths. Shape suffixes: N sampled tokens, O output channels, K input channels, C scales of a fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.core.folds import Fold, folds_of
from compress.core.grid import fit_grid, input_scale
from compress.core.int8_products import fast_int8_products, fits_int8, int8_product
from compress.core.rounded_inputs import int8_inputs
from compress.core.scheme import Scheme
from compress.core.statistics import AbsMax, Sample
from compress.core.tensors import QuantTensor
from compress.core.walk import Block, Group
from quantize.prepare._exponents import least
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


@dataclass(frozen=True)
class _Layer:
    """A layer that is to be rounded: its weight, and what the sampled inputs give in full precision."""

    weight_OK: Tensor
    scheme: Scheme
    y_NO: Tensor
    energy: Tensor  # sum of y²


@dataclass(frozen=True)
class _Inputs:
    """The sampled inputs of a group, the largest |input| of each channel, and the layers that read them."""

    x_NK: Tensor
    largest_K: Tensor
    layers: tuple[_Layer, ...]


def _searched(fold: Fold, target: Target, inputs_C: Tensor, weights_C: Tensor, steps: int) -> Tensor | None:
    """The scales with the least output error; None if none beats leaving everything as it is."""
    read = [_read(group, target) for group in fold.groups if group.tokens]
    scale_dtype = target.checkpoint.dtype

    def error(step: int) -> float:
        return _error(read, fold.spread(smoothing(inputs_C, weights_C, step / steps)), scale_dtype)

    plain = _error(read, torch.ones_like(fold.spread(inputs_C)), scale_dtype)
    best, _ = least(steps, error, plain)
    return None if best is None else smoothing(inputs_C, weights_C, best / steps)


def _read(group: Group, target: Target) -> _Inputs:
    x_NK = group.statistics[Sample]
    layers = []
    for site in group.sites:
        scheme = target.scheme_for(site.name, group.width)
        if scheme is not None:
            y_NO = x_NK @ site.weight.T
            layers.append(_Layer(site.weight, scheme, y_NO, y_NO.square().sum().clamp(min=1e-30)))
    return _Inputs(x_NK, group.statistics[AbsMax], tuple(layers))


def _error(read: list[_Inputs], scale_K: Tensor, scale_dtype: torch.dtype) -> float:
    """Squared error of the outputs with inputs and weights rounded, relative to the outputs, summed over the layers."""
    total = 0.0
    for group in read:
        smoothed_NK = group.x_NK / scale_K
        largest = (group.largest_K / scale_K).max().view(1)
        for layer in group.layers:
            scaled_OK = layer.weight_OK * scale_K
            weight = fit_grid(scaled_OK, layer.scheme, scale_dtype=scale_dtype).round(scaled_OK)
            static = input_scale(largest, layer.scheme, torch.float32) if layer.scheme.static_inputs else None
            wrong_NO = _product(smoothed_NK, weight, static).sub_(layer.y_NO)
            total += float(wrong_NO.square_().sum() / layer.energy)
    return total


def _product(x_NK: Tensor, weight: QuantTensor, static: Tensor | None) -> Tensor:
    """What rounded inputs and weights give. Integer products are exact and, where the CPU has them, many times as fast:
    these products are all that the search costs."""
    codes_NK, scale_N1 = int8_inputs(x_NK, static)
    if weight.zero is None and fits_int8(weight) and x_NK.device.type == "cpu" and fast_int8_products():
        sums_NO = int8_product(codes_NK, weight.codes()).float()
        return sums_NO.mul_(scale_N1).mul_(weight.scale[:, 0].float())
    return (codes_NK.float() * scale_N1) @ weight.dequantize(torch.float32).T
