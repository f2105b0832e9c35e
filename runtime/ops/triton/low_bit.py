"""Products with packed integer weights in Triton: codes become numbers in registers, next to the product.

Codes are small integers, exact in bf16 and fp16: they go into the product as they are, less their zero point, and the
group's scale is applied to the product's fp32 result, one multiplication per output instead of one per weight. With few
rows the weight's bytes are the whole cost; the input channels are then shared out among SPLITS programs to keep all
processors reading (Hoque et al., 2024, arXiv:2402.00025).

Shape suffixes: T rows, K input channels, O output channels, W 32-bit words of a row, G groups of a row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime.ops.triton.device import processors

_BITS = (2, 4, 8)  # code widths that do not straddle words
_SPLIT_ROWS = 16  # more rows fill the GPU by themselves


@dataclass(frozen=True)
class Tile:
    """How one launch is cut: rows, output channels and input channels of a program's step, warps, pipeline stages."""

    t: int
    o: int
    k: int
    warps: int
    stages: int


def supports(scheme: Scheme) -> bool:
    """Whether codes are integers, a whole number of them fills a word, and tiles of input channels fit the groups."""
    whole = scheme.dtype == "int" and scheme.bits in _BITS
    return whole and _channels_of_a_step(scheme.group_size) >= 32


def _channels_of_a_step(group_size: int) -> int:
    """The largest power of two, up to 128, that divides the group."""
    return 128 if group_size == -1 else min(group_size & -group_size, 128)


def tile_for(rows: int, group_size: int) -> Tile:
    """Shapes chosen without timing anything."""
    channels = _channels_of_a_step(group_size)
    if rows <= _SPLIT_ROWS:
        return Tile(16, 64, channels, warps=4, stages=3)
    return Tile(64 if rows > 32 else 32, 64, min(channels, 64), warps=4, stages=3)


def splits_for(rows: int, outputs: int, steps: int, tile: Tile, available: int) -> int:
    """A power of two: programs for two on every processor, at least four steps each."""
    if rows > _SPLIT_ROWS:
        return 1
    programs = triton.cdiv(outputs, tile.o)
    wanted = min(2 * available // programs, steps // 4, 16)
    return 1 << max(wanted, 1).bit_length() - 1


def matmul(x_TK: torch.Tensor, weight: QuantTensor, *, splits: int | None = None) -> torch.Tensor:
    """`low_bit_matmul`, for schemes that `supports` accepts; `splits` fixes how many parts the input channels make."""
    rows, inputs = x_TK.shape
    outputs = weight.shape[0]
    scheme = weight.scheme
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    tile = tile_for(rows, scheme.group_size)
    steps = triton.cdiv(inputs, tile.k)
    if splits is None:
        splits = splits_for(rows, outputs, steps, tile, processors(x_TK.device))
    out_dtype = x_TK.dtype if splits == 1 else torch.float32
    out_XTO = torch.empty((splits, rows, outputs), dtype=out_dtype, device=x_TK.device)
    _matmul[(triton.cdiv(outputs, tile.o), triton.cdiv(rows, tile.t), splits)](
        x_TK,
        weight.packed,
        weight.scale,
        weight.packed if weight.zero is None else weight.zero,
        out_XTO,
        rows,
        x_TK.stride(0),
        weight.packed.stride(0),
        weight.scale.stride(0),
        0 if weight.zero is None else weight.zero.stride(0),
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUP=inputs if scheme.group_size == -1 else scheme.group_size,
        BITS=scheme.bits,
        HAS_ZERO=weight.zero is not None,
        BLOCK_T=tile.t,
        BLOCK_O=tile.o,
        BLOCK_K=tile.k,
        SPLITS=splits,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_XTO[0] if splits == 1 else out_XTO.sum(0).to(x_TK.dtype)


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    x_stride,
    packed_stride,
    scale_stride,
    zero_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (o, t, split): one tile of the result, over its share of the steps of BLOCK_K input channels."""
    CODES: tl.constexpr = 32 // BITS  # of a word
    WORDS: tl.constexpr = BLOCK_K // CODES
    ROW_WORDS: tl.constexpr = (INPUTS + CODES - 1) // CODES
    STEPS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    split = tl.program_id(2)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_o = o < OUTPUTS
    real_t = t < rows
    row_o = o.to(tl.int64)
    row_t = t.to(tl.int64)
    shift = tl.arange(0, CODES) * BITS
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for step in range(split * SHARE, tl.minimum(split * SHARE + SHARE, STEPS)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        word = step * WORDS + tl.arange(0, WORDS)
        x_at = row_t[:, None] * x_stride + k[None, :]
        x = tl.load(x_ptr + x_at, mask=real_t[:, None] & (k < INPUTS)[None, :], other=0.0)
        packed_at = row_o[:, None] * packed_stride + word[None, :]
        packed = tl.load(packed_ptr + packed_at, mask=real_o[:, None] & (word < ROW_WORDS)[None, :], other=0)
        code = (packed[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
        code = tl.reshape(code, [BLOCK_O, BLOCK_K]) - (1 << (BITS - 1))
        group = step * BLOCK_K // GROUP
        scale = tl.load(scale_ptr + row_o * scale_stride + group, mask=real_o, other=0.0).to(tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + row_o * zero_stride + group, mask=real_o, other=0).to(tl.int32)
            code = code - zero[:, None]
        product = tl.dot(x, tl.trans(code.to(x.dtype)), input_precision="ieee")
        acc += product * scale[None, :]
    out_at = (split * rows + row_t)[:, None] * OUTPUTS + o[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=real_t[:, None] & real_o[None, :])
