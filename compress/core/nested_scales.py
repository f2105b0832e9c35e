"""Double quantization (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3): scales are numbers of
8 bits themselves. Their mean is taken off, and what is left shares one fp32 scale among 256.

Shape suffixes: O output channels, G groups, N blocks of 256 scales along the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.core.levels import dynamic, nearest

NESTED_BLOCK = 256
_LEAST = 1e-38  # of a block: its reciprocal is still a number


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales as they are stored: scale = levels[code] * absmax + offset.

    codes uint8 [O, G]; absmax fp32 [N], one for each `block` of codes; levels fp32 [256]; offset: an fp32 number.
    dtype is that of the weights before, which readers dequantize to.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    offset: float
    dtype: torch.dtype
    block: int = NESTED_BLOCK

    def numbers(self) -> torch.Tensor:
        """The scales, fp32 [O, G]."""
        absmax = self.absmax.repeat_interleave(self.block)[: self.codes.numel()].view(self.codes.shape)
        return self.levels[self.codes.int()] * absmax + self.offset

    def to(self, device: str | torch.device) -> NestedScales:
        """The same on another device."""
        codes, absmax, levels = (part.to(device) for part in (self.codes, self.absmax, self.levels))
        return replace(self, codes=codes, absmax=absmax, levels=levels)


def nest(scale_OG: torch.Tensor) -> NestedScales:
    """The nearest codes of scales; their dtype is taken for that of the weights."""
    flat = scale_OG.float().reshape(-1)
    offset = flat.mean()
    rest = torch.nn.functional.pad(flat - offset, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax_N = rest.abs().amax(-1)
    codes = nearest(rest * (1 / absmax_N.clamp(min=_LEAST))[:, None], dynamic())
    codes_OG = codes.view(-1)[: len(flat)].view(scale_OG.shape)
    levels = dynamic().to(scale_OG.device)
    return NestedScales(codes_OG, absmax_N, levels, float(offset), scale_OG.dtype)
