"""Weights of up to 4 bits through torch's packed int4 kernel, which takes bf16 inputs on a CPU.

Codes are repacked once to the kernel's own layout (4 bits a weight, also those of 2 and 3 bits); output channels are
padded to a multiple of 16, and a group that the kernel does not know is cut into groups that it does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.core.rounded_inputs import rounded_inputs
from compress.core.tensors import QuantTensor
from runtime.layers.base import LinearLayer

_GROUPS = (256, 128, 64, 32)
_OUT_MULTIPLE = 16
_MIDDLE = 8  # the kernel means (code - 8) * scale + zero
_ROW_TILE = 64


def int4_group(weight: QuantTensor) -> int | None:
    """The kernel's group size that holds this weight, None if there is none."""
    width, scheme = weight.shape[1], weight.scheme
    if scheme.dtype != "int" or scheme.bits > 4:
        return None
    size = scheme.group_width(width)
    return next((group for group in _GROUPS if size % group == 0 and width % group == 0), None)


class Int4Linear(LinearLayer):
    """Weights (code - zero) * scale with bf16 scales, bf16 inputs and fp32 sums."""

    packed: Tensor
    scale_zero: Tensor

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        group = int4_group(weight)
        if group is None:
            raise ValueError(f"no group of the int4 kernel holds a {weight.scheme}")
        self.scheme, self.group = weight.scheme, group
        missing = -weight.shape[0] % _OUT_MULTIPLE
        codes_OK = functional.pad((weight.codes() + _MIDDLE).to(torch.int32), (0, 0, 0, missing))
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OK, 1))
        self.register_buffer("scale_zero", functional.pad(_scale_zero(weight, group), (0, 0, 0, missing)))

    def product(self, x_MK: Tensor) -> Tensor:
        x_MK = rounded_inputs(x_MK.float(), self.scheme).bfloat16()
        tiles = [
            torch.ops.aten._weight_int4pack_mm_for_cpu(tile_MK.contiguous(), self.packed, self.group, self.scale_zero)
            for tile_MK in x_MK.split(_ROW_TILE)
        ]
        return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:, : self.out_features]


def _scale_zero(weight: QuantTensor, group: int) -> Tensor:
    """bf16 [K / group, O, 2]: scale, and the value of the middle code."""
    scale_OG = weight.scale.float()
    middle_OG = torch.zeros_like(scale_OG) if weight.zero is None else -weight.zero.float() * scale_OG
    pair_OG2 = torch.stack((scale_OG, middle_OG), dim=2)
    width, size = weight.shape[1], weight.scheme.group_size
    cut = pair_OG2.repeat_interleave((width if size == -1 else size) // group, dim=1)[:, : width // group]
    return cut.transpose(0, 1).contiguous().bfloat16()
