"""Exact products of 8-bit codes through torch's integer kernel, where the CPU is made for them."""

from __future__ import annotations

import torch

from compress.core.tensors import QuantTensor

_WIDTH_MULTIPLE = 32


def fast_int8_products() -> bool:
    """Whether the CPU has instructions for products of int8. Without them torch._int_mm takes 4 to 20 times as long as
    the dense product."""
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def fits_int8(weight: QuantTensor) -> bool:
    """Whether the int8 kernels hold this weight. torch reads beyond rows that are no multiple of its vectors."""
    return weight.scheme.dtype == "int" and weight.scale.shape[1] == 1 and weight.shape[1] % _WIDTH_MULTIPLE == 0


def int8_product(codes_MK: torch.Tensor, weight_codes_OK: torch.Tensor) -> torch.Tensor:
    """int32 sums [M, O] of int8 codes."""
    return torch.ops.aten._int_mm(codes_MK, weight_codes_OK.T)
