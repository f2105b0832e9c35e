"""Layers of a masked model: packed where that is known, or found, to be faster than dense, and dense elsewhere.

On a CPU a rule decides, so that the same model always gives the same tokens: benchmarks/sparse_linear.py has the
figures that it comes from. On a GPU each shape is measured when the first layer of it is loaded. Nothing is kept twice.
Shape suffixes: M rows, K input channels, O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from compress.core.zeros import in_two_of_four, share_of_zeros
from runtime.layers.base import LinearLayer
from runtime.layers.bitmap import BitmapLinear
from runtime.layers.dense import CompiledDense, DenseLinear
from runtime.layers.gpu_timing import layer_milliseconds
from runtime.layers.semi_structured import LEAST_CAPABILITY, SemiStructuredLinear, has_sparse_cores
from runtime.native.bitmap import has_tiles, takes_zeros

Sparse = Literal["auto", "off"]
ROWS = (1, 16, 512)  # a stream by itself, a small batch, a prompt: as important as each other
FASTER = 0.95  # of the dense layer's time, or less: what is nearly the same stays dense
_SOME_ZEROS = 0.01  # fewer come by chance: nobody pruned that layer
_LEAST_ZEROS = 0.45
_LEAST_WEIGHTS = 1 << 18  # of a layer that a CPU packs
_CLOSE = 2e-2  # relative difference of bf16 products that sum in another order, at most


@dataclass(frozen=True)
class Packing:
    """What became of a layer with zeros. `form`: how it is held, "" if dense. `zeros`: their share. `against_dense`:
    time of the packed layer over that of the dense one, by rows, where both were measured while loading."""

    form: str
    zeros: float
    reason: str
    against_dense: Mapping[int, float] = field(default_factory=dict)


class Packer:
    """Packs the layers of one model."""

    def __init__(self) -> None:
        self._measured: dict[tuple[object, ...], Packing] = {}

    def pack(self, layer: LinearLayer) -> LinearLayer:
        """The layer that is to be used instead of a dense one: a packed one, or itself; either says why."""
        if not isinstance(layer, DenseLinear | CompiledDense):
            return layer
        zeros = share_of_zeros(layer.weight)
        if zeros < _SOME_ZEROS:
            return layer
        if layer.weight.device.type == "cpu":
            packing = _rule(layer, zeros)
            packed = BitmapLinear(layer.weight, layer.bias) if packing.form else layer
        else:
            packed, packing = self._on_gpu(layer, zeros)
        packed.packing = packing
        return packed

    def _on_gpu(self, layer: LinearLayer, zeros: float) -> tuple[LinearLayer, Packing]:
        if not in_two_of_four(layer.weight):
            return layer, Packing("", zeros, "zeros do not lie in 2:4")
        if not has_sparse_cores(layer.weight.device):
            return layer, Packing("", zeros, f"the GPU is below compute capability {LEAST_CAPABILITY[0]}.0")
        try:
            packed = SemiStructuredLinear(layer.weight, layer.bias)
            kind = (*layer.weight.shape, layer.weight.dtype, layer.bias is None)
            if kind not in self._measured:
                self._measured[kind] = measured(layer, packed)
        except RuntimeError as error:  # torch's only word for a shape, dtype or build that it cannot do
            return layer, Packing("", zeros, f"torch cannot pack it: {str(error).splitlines()[0][:200]}")
        found = self._measured[kind]
        packing = Packing(found.form, zeros, found.reason, found.against_dense)
        return (packed if found.form else layer), packing


def measured(dense: LinearLayer, packed: LinearLayer) -> Packing:
    """Which of two layers on a GPU to take, by the mean (geometric) of packed : dense over ROWS."""
    weight, ratios = dense.weight, {}
    generator = torch.Generator(weight.device).manual_seed(0)
    for rows in ROWS:
        shape = (rows, weight.shape[1])
        x_MK = torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
        apart = _difference(dense, packed, x_MK)
        if not apart < _CLOSE:
            return Packing("", 0.5, f"packed it gives other outputs at {rows} rows: {apart:.2g} apart")
        ratios[rows] = layer_milliseconds(packed, x_MK) / layer_milliseconds(dense, x_MK)
    return choice(ratios)


def choice(ratios: Mapping[int, float]) -> Packing:
    """The verdict on times of packed : dense by rows; the share of zeros is 2:4's."""
    mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
    if mean <= FASTER:
        return Packing("2:4", 0.5, "measured while loading", ratios)
    return Packing("", 0.5, f"measured while loading: packed takes {mean:.2f} of the dense time", ratios)


@torch.inference_mode()
def _difference(dense: LinearLayer, packed: LinearLayer, x_MK: Tensor) -> float:
    wanted = dense(x_MK).float()
    return float((packed(x_MK).float() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _rule(layer: DenseLinear | CompiledDense, zeros: float) -> Packing:
    """For a CPU."""
    if not takes_zeros(layer.weight):
        return Packing("", zeros, "there is no CPU kernel for this dtype, shape or machine")
    if isinstance(layer, DenseLinear) and not has_tiles():
        return Packing("", zeros, "with bf16 inputs nothing is known to be faster without AMX")
    if zeros < _LEAST_ZEROS:
        return Packing("", zeros, f"less than {_LEAST_ZEROS:.0%} of it are zeros")
    if layer.weight.numel() < _LEAST_WEIGHTS:
        return Packing("", zeros, "it is small")
    return Packing("bitmap", zeros, "by the table of benchmarks/sparse_linear.py")
