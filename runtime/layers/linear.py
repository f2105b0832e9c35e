"""One way to make a linear layer, whatever its weight is stored as and whichever numerics are asked for.

exact  fp32; a row's result does not depend on the batch. For parity and equality tests.
fast   the dtype of compress.core.numerics and packed kernels. A layer without one says so in `slow_reason`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from compress.core.errors import UsageError
from compress.core.int8_products import fast_int8_products, fits_int8
from compress.core.numerics import Numerics, runtime_dtype
from compress.core.tensors import QuantTensor
from runtime.layers.base import LinearLayer
from runtime.layers.compiled import CompiledLinear, fits_kernels
from runtime.layers.dense import CompiledDense, DenseLinear, fits_bf16_kernel
from runtime.layers.exact import ExactDense, ExactPacked
from runtime.layers.gpu import GpuLinear
from runtime.layers.int4pack import Int4Linear, int4_group
from runtime.layers.int8 import Int8Linear, Int8ProductLinear
from runtime.layers.packed import DequantizingLinear

__all__ = ["LinearLayer", "concatenate", "make_linear"]


def make_linear(
    weight: Tensor | QuantTensor,
    bias: Tensor | None = None,
    *,
    numerics: Numerics,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> LinearLayer:
    """A layer that computes x Wᵀ + b for weight [out, in] and bias [out].

    `dtype` is that of dense products in fast mode, `runtime_dtype` if left out. Packed weights stay packed, bf16 ones
    stay bf16 where a kernel takes them beside fp32 inputs; weights are repacked at most once, here. `compiled`
    False leaves the kernels of `native` out, and torch's take their place.
    """
    if numerics not in ("exact", "fast"):
        raise UsageError(f"numerics {numerics!r} are unknown: choose exact or fast")
    weight = weight.to(device)
    bias = None if bias is None else bias.to(device)
    if isinstance(weight, Tensor):
        if numerics == "exact":
            return ExactDense(weight, bias)
        dtype = runtime_dtype(numerics, device, dtype)
        if compiled and dtype is torch.float32 and fits_bf16_kernel(weight):
            return CompiledDense(weight, bias)
        return DenseLinear(weight, bias, dtype)
    if numerics == "exact":
        return ExactPacked(weight, bias)
    if torch.device(device).type != "cpu":
        return GpuLinear(weight, bias)
    return _fast_on_cpu(weight, bias, compiled)


def _fast_on_cpu(weight: QuantTensor, bias: Tensor | None, compiled: bool) -> LinearLayer:
    """benchmarks/low_bit_linear.py measures the choices."""
    scheme = weight.scheme
    int8_inputs = scheme.activation_bits == 8 and scheme.bits > 4 and fits_int8(weight)
    if int8_inputs and fast_int8_products():
        return Int8ProductLinear(weight, bias)
    if compiled and fits_kernels(weight):
        return CompiledLinear(weight, bias)
    if int8_inputs:
        return Int8ProductLinear(weight, bias)
    if int4_group(weight) is not None:
        return Int4Linear(weight, bias)
    if fits_int8(weight):
        return Int8Linear(weight, bias)
    return DequantizingLinear(weight, bias, _why_slow(weight))


def _why_slow(weight: QuantTensor) -> str:
    scheme = weight.scheme
    if scheme.dtype != "int":
        return f"torch has no CPU kernel for {scheme.name} weights: they are dequantized at each step"
    return (
        f"torch has no CPU kernel for {scheme.bits}-bit weights in groups of {scheme.group_size} over "
        f"{weight.shape[1]} input channels: they are dequantized at each step"
    )


@overload
def concatenate(weights: Sequence[Tensor]) -> Tensor:
    """Of dense weights."""


@overload
def concatenate(weights: Sequence[QuantTensor]) -> QuantTensor:
    """Of packed weights."""


def concatenate(weights: Sequence[Tensor] | Sequence[QuantTensor]) -> Tensor | QuantTensor:
    """One weight of several of the same kind, along their output channels: q, k, v or gate, up as one layer."""
    packed = [weight for weight in weights if isinstance(weight, QuantTensor)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if not packed:
        return torch.cat(dense)
    first = packed[0]
    if dense or any(weight.scheme != first.scheme or weight.shape[1] != first.shape[1] for weight in packed):
        raise UsageError("layers of different schemes or widths cannot become one")
    return QuantTensor.stack(packed)
