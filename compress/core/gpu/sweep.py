# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
# Triton is there on Linux alone, and its kernels are called by subscript.
"""The column sweep of GPTQ inside one block of columns, in Triton: one program per strip of rows.

A strip keeps what its columns should have in registers. Columns go by from the last to the first; the error of each is
added to all that are still to come at once (in C and torch each column gathers them: the same sums in another order).

Shape suffixes as in `compress.core.solve`; G groups.
"""

import triton
import triton.language as tl
from torch import Tensor

STRIP = 16
_WARPS = 4


def sweep_block(
    *,
    target_BR: Tensor,
    original_BR: Tensor,
    feedback_BB: Tensor,
    scale_GR: Tensor,
    zero_GR: Tensor | None,
    group_B: Tensor,
    channel_B: Tensor,
    cost_B: Tensor,
    levels: tuple[int, int] | None,
    error_BR: Tensor,
    codes_KR: Tensor,
    loss_R: Tensor,
    keep_zeros: bool,
) -> None:
    """`compress.core.native.sweep_block`."""
    columns, rows = target_BR.shape
    lowest, highest = levels or (0, 0)
    _sweep[(triton.cdiv(rows, STRIP),)](
        target_BR,
        original_BR,
        feedback_BB.t().contiguous(),
        scale_GR,
        1 / scale_GR,
        scale_GR if zero_GR is None else zero_GR,
        group_B,
        channel_B,
        cost_B,
        error_BR,
        codes_KR,
        loss_R,
        columns,
        rows,
        float(lowest),
        float(highest),
        HAS_ZERO=zero_GR is not None,
        FLOATS=levels is None,
        KEEP_ZEROS=keep_zeros,
        BLOCK_B=max(triton.next_power_of_2(columns), 16),
        BLOCK_R=STRIP,
        num_warps=_WARPS,
    )


@triton.jit
def _sweep(
    target_ptr,
    original_ptr,
    feedback_ptr,
    scale_ptr,
    inverse_ptr,
    zero_ptr,
    group_ptr,
    channel_ptr,
    cost_ptr,
    error_ptr,
    codes_ptr,
    loss_ptr,
    columns,
    rows,
    lowest,
    highest,
    HAS_ZERO: tl.constexpr,
    FLOATS: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < rows
    column_B = tl.arange(0, BLOCK_B)
    real_BR = (column_B < columns)[:, None] & real_R[None, :]
    aim_BR = tl.load(target_ptr + column_B[:, None].to(tl.int64) * rows + row_R[None, :], mask=real_BR, other=0.0)
    loss_R = tl.load(loss_ptr + row_R, mask=real_R, other=0.0)
    for step in range(columns):
        i = columns - 1 - step
        at_R = i.to(tl.int64) * rows + row_R
        grid_R = tl.load(group_ptr + i) * rows + row_R
        target_R = tl.sum(tl.where((column_B == i)[:, None], aim_BR, 0.0), 0)
        scale_R = tl.load(scale_ptr + grid_R, mask=real_R, other=1.0)
        scaled_R = target_R * tl.load(inverse_ptr + grid_R, mask=real_R, other=1.0)
        zero_R = tl.load(zero_ptr + grid_R, mask=real_R, other=0.0) if HAS_ZERO else tl.zeros_like(target_R)
        if FLOATS:
            level_R, code_R = _nearest_e2m1(scaled_R)
        elif HAS_ZERO:
            level_R = _round(tl.minimum(tl.maximum(scaled_R, lowest - zero_R), highest - zero_R))
            code_R = level_R + zero_R
        else:
            level_R = _round(tl.minimum(tl.maximum(scaled_R, lowest), highest))
            code_R = level_R
        original_R = tl.load(original_ptr + at_R, mask=real_R, other=0.0)
        if KEEP_ZEROS:
            level_R = tl.where(original_R == 0.0, 0.0, level_R)
            code_R = tl.where(original_R == 0.0, zero_R, code_R)
        chosen_R = level_R * scale_R
        residual_R = target_R - chosen_R
        loss_R += residual_R * residual_R * tl.load(cost_ptr + i)
        error_R = original_R - chosen_R
        feedback_B = tl.load(feedback_ptr + i * columns + column_B, mask=column_B < i, other=0.0)
        aim_BR += feedback_B[:, None] * error_R[None, :]
        tl.store(error_ptr + at_R, error_R, mask=real_R)
        tl.store(codes_ptr + tl.load(channel_ptr + i) * rows + row_R, code_R.to(tl.int8), mask=real_R)
    tl.store(loss_ptr + row_R, loss_R, mask=real_R)


@triton.jit
def _round(x):
    """To the nearest whole number, halves to the even one: fp32 numbers near 1.5 x 2^23 are whole. |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest_e2m1(x):
    """`compress.core.levels.nearest_e2m1` and its code: beyond 2 there are only 3, 4 and 6."""
    size = tl.minimum(tl.abs(x), 6.0)
    octave = (tl.maximum(size, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = octave * 6291456.0
    size = (size + shift) - shift
    code = tl.where(size <= 2.0, size * 2.0, tl.where(size == 3.0, 5.0, tl.where(size == 4.0, 6.0, 7.0)))
    negative = (x < 0.0) & (size > 0.0)
    return tl.where(negative, -size, size), tl.where(negative, code + 8.0, code)
