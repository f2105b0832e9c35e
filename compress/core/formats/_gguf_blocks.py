"""Blocks of GGUF: written from codes and scales or by rounding weights, vectorised; read by `_gguf_reader`.

Layouts: https://github.com/ggml-org/llama.cpp, ggml-common.h. N blocks; little-endian; d and m are fp16.

Q4_0  32 weights   d, 16 bytes: byte j holds code j (low) and j + 16 (high)              w = (code - 8) d
Q8_0  32 weights   d, 32 int8                                                            w = code d
Q4_K  256 weights  d, m, 12 bytes of 6-bit scales s and minima t of 8 sub-blocks of 32,
                   128 bytes: of each 64 weights the first 32 low, the others high       w = d s code - m t
Q6_K  256 weights  128 bytes of low nibbles, 64 of high bits, 16 int8 scales s of 16, d  w = d s (code - 32)

The searches round every sub-block under several scales, solve for the best scale (and minimum) of each by least squares
and keep the best; blocks share nothing, so that a block's bytes do not depend on its neighbours.
"""

from __future__ import annotations

import torch

from compress.core.errors import UsageError
from compress.core.formats._gguf_types import BF16, F16, F32, Q4_0, Q4_K, Q6_K, Q8_0, BlockType
from compress.core.grid import Clip, fit_grid
from compress.core.scheme import Scheme

_BLOCKS_AT_ONCE = 1 << 13  # so that what the searches hold stays in the cache
_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_STEPS_4 = [-1.0 + 0.1 * step for step in range(21)]
_STEPS_6 = [0.1 * step for step in range(-9, 10)]


def quantize(weight_OK: torch.Tensor, type: BlockType) -> torch.Tensor:
    """Bytes uint8 [O, bytes of a row] of `type` for fp32 weights; each block takes the scales with the least error."""
    rows, width = weight_OK.shape
    if width % type.weights:
        raise UsageError(f"rows of {width} weights are no multiple of the blocks of {type.name}")
    if type in _FLOATS:
        return weight_OK.to(_FLOATS[type]).contiguous().view(torch.uint8)
    blocks = weight_OK.float().reshape(-1, type.weights)
    encode = {Q4_0: _q4_0, Q8_0: _q8_0, Q4_K: _q4_k, Q6_K: _q6_k}[type]
    return torch.cat([encode(part) for part in blocks.split(_BLOCKS_AT_ONCE)]).view(rows, -1)


def from_codes(codes_OK: torch.Tensor, scale_OB: torch.Tensor, type: BlockType) -> torch.Tensor:
    """Bytes of Q4_0 (codes -8 … 7) or Q8_0 (any int8) for signed codes [O, K] and an fp16 scale of every 32 weights."""
    blocks = codes_OK.reshape(-1, type.weights)
    pack = _pack_q4_0 if type == Q4_0 else _pack_q8_0
    return pack(blocks, scale_OB.reshape(-1, 1)).view(len(codes_OK), -1)


def _pack_q4_0(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
    return torch.cat([_octets(scale), unsigned[:, :16] | unsigned[:, 16:] << 4], dim=1)


def _pack_q8_0(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.cat([_octets(scale), codes.to(torch.int8).view(torch.uint8)], dim=1)


def _octets(values: torch.Tensor) -> torch.Tensor:
    """fp16 [N, k] -> bytes [N, 2k]."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    grid = fit_grid(blocks, Scheme(4, 32), scale_dtype=torch.float16, clip=Clip())
    return _pack_q4_0(grid.round(blocks).codes(), grid.scale)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks * _inverse(scale.float())).round().clamp_(-127, 127)
    return _pack_q8_0(codes, scale)


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 where they are 0."""
    return torch.where(values == 0, 0, 1 / torch.where(values == 0, 1, values))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    x = blocks.view(-1, 8, 32)
    scale, low = _fit_with_minimum(x)  # both [N, 8], low >= 0 is what is taken away
    d, m = (_largest(values, 63) for values in (scale, low))
    scale6, low6 = ((values * _inverse(unit.float())).round().clamp_(0, 63) for values, unit in ((scale, d), (low, m)))
    taken = (m.float() * low6)[..., None]
    codes = ((x + taken) * _inverse(d.float() * scale6)[..., None]).round().clamp_(0, 15).to(torch.uint8)
    pairs = codes.view(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return torch.cat([_octets(d), _octets(m), _six_bits(scale6, low6), nibbles], dim=1)


def _largest(values: torch.Tensor, levels: int) -> torch.Tensor:
    """fp16 [N, 1]: the unit in which the largest of each row is `levels`."""
    return (values.amax(1, keepdim=True) / levels).half()


def _six_bits(scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    s, t = scale.to(torch.uint8), low.to(torch.uint8)
    first = [s[:, :4] | s[:, 4:] >> 4 << 6, t[:, :4] | t[:, 4:] >> 4 << 6]
    return torch.cat([*first, s[:, 4:] & 15 | (t[:, 4:] & 15) << 4], dim=1)


def _fit_with_minimum(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum (as a positive number) of each sub-block for codes 0 … 15; large weights count more."""
    weight = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    low, high = x.amin(-1).clamp_(max=0), x.amax(-1)
    total, total_x = weight.sum(-1), (weight * x).sum(-1)
    best_scale, best_low = (high - low).clamp(min=0) / 15, -low  # from minimum to maximum; exact where all are equal
    plain = ((x + best_low[..., None]) * _inverse(best_scale)[..., None]).round_().clamp_(0, 15)
    best = (weight * (plain * best_scale[..., None] - best_low[..., None] - x).square()).sum(-1)
    for step in _STEPS_4:
        inverse = (15 + step) * _inverse((high - low).clamp_(min=0))
        codes = ((x - low[..., None]) * inverse[..., None]).round_().clamp_(0, 15)
        weighted = weight * codes
        c, cc, cx = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        determinant = total * cc - c * c
        usable = determinant > 0
        over = _inverse(torch.where(usable, determinant, 0))
        scale, minimum = (total * cx - total_x * c) * over, (cc * total_x - c * cx) * over
        scale = torch.where(minimum > 0, cx * _inverse(cc), scale)
        minimum = minimum.clamp(max=0)
        error = (weight * (codes * scale[..., None] + minimum[..., None] - x).square()).sum(-1)
        better = usable & (error < best) & (scale > 0)
        best = torch.where(better, error, best)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, -minimum, best_low)
    return best_scale, best_low


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    x = blocks.view(-1, 16, 16)
    scale = _fit_signed(x)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (largest / -128).half()
    scale8 = (scale * _inverse(d.float())).round().clamp_(-128, 127)
    codes = (x * _inverse(d.float() * scale8)[..., None]).round().clamp_(-32, 31) + 32
    rows = codes.to(torch.uint8).view(-1, 2, 4, 32)  # two halves of four rows of 32
    low, high = rows & 15, rows >> 4
    nibbles = torch.cat([low[:, :, :2] | low[:, :, 2:] << 4], dim=2).reshape(-1, 128)
    bits = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    return torch.cat([nibbles, bits, scale8.to(torch.int8).view(torch.uint8), _octets(d)], dim=1)


def _fit_signed(x: torch.Tensor) -> torch.Tensor:
    """Scale of each sub-block for codes -32 … 31, signed so that the largest weight takes the side with one more."""
    weight = x.square()
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.zeros(x.shape[:-1])
    best_scale = torch.zeros(x.shape[:-1])
    for step in _STEPS_6:
        codes = (x * (-(32 + step) * _inverse(largest))).round_().clamp_(-32, 31)
        weighted = weight * codes
        cc, cx = (weighted * codes).sum(-1), (weighted * x).sum(-1)
        scale = cx * _inverse(cc)
        better = scale * cx > best
        best = torch.where(better, scale * cx, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale
