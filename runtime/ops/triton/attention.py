"""Paged attention in Triton: one kernel for prefill chunks and decodes (attention_launch.py says how they are cut).

A program owns the query heads of one key-value head and several tokens of one sequence: packed, they fill the rows of
one product, and each key is read once per group (Kwon et al., 2023, arXiv:2309.06180; Dao et al., 2022,
arXiv:2205.14135).

Shape suffixes: T tokens, H query heads, G key-value heads, D head width, P pages, B slots of a page. In the kernels:
M rows of a program (tokens times heads of a group), N keys of a tile.
"""

import torch
import triton
import triton.language as tl

from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages, as_pages
from runtime.ops.triton.attention_launch import LOG2_E, in_launches, join, room_for, tile_for
from runtime.ops.triton.attention_parts import FLOOR, ended, folded, part_of, rows_of, seen_by

CODINGS = {"full": 0, "int8": 1, "int4": 2, "fp8": 3}
_INT8, _INT4, _FP8 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def attend(
    q_THD: torch.Tensor,
    k: torch.Tensor | Pages,
    v: torch.Tensor | Pages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    segments: int | None = None,
) -> torch.Tensor:
    """`paged_attention`. The decodes that lead the batch and the chunks that follow are launched apart.

    `segments` (a power of two) fixes the number of parts that a decode's keys are cut into; else it follows from the
    number of sequences.
    """
    return in_launches(_launch, q_THD, as_pages(k), as_pages(v), batch, segments, scale, window, softcap)


def _launch(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    batch: AttentionBatch,
    first: int,
    end: int,
    segments: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of sequences first … end - 1."""
    heads, width = q_THD.shape[1:]
    block, groups = k.block, k.groups
    group = heads // groups
    queries = batch.starts[end] - batch.starts[first]
    tile = tile_for(decode=queries == end - first, group=group, width=width, element_bytes=q_THD.element_size())
    block_q = tile.m // group
    block_d = max(16, triton.next_power_of_2(width))
    parts = room_for(out_THD, segments)
    _attend[(queries // block_q + end - first, groups, segments)](
        q_THD,
        k.codes,
        v.codes,
        *_beside(k),
        *_beside(v),
        *parts,
        batch.starts_S1[first:],
        batch.kv_len_S[first:],
        batch.table_SP[first:],
        batch.index_T,
        scale * LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        0 if window is None else window,
        end - first,
        batch.table_SP.stride(0),
        q_THD.stride(0),
        q_THD.stride(1),
        k.codes.stride(0),
        k.slot_rows * k.codes.stride(2),
        k.codes.stride(2),
        v.codes.stride(0),
        v.slot_rows * v.codes.stride(2),
        v.codes.stride(2),
        GROUPS=groups,
        PAGE_ROWS=k.page_rows,
        SLOT_ROWS=k.slot_rows,
        GROUP=group,
        WIDTH=width,
        BLOCK=block,
        BLOCK_D=block_d,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_Q=block_q,
        SEGMENTS=segments,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        K_CODING=CODINGS[k.codec],
        V_CODING=CODINGS[v.codec],
        BLOCK_H=max(16, triton.next_power_of_2((width + 1) // 2)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    join(out_THD, parts, batch.starts_S1[first:], queries, segments)


def _beside(pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp16 numbers and the fp32 scales of codes; something in the place of what a codec has not."""
    return tuple(pages.codes if x is None else x for x in (pages.numbers, pages.scale_G))


@triton.jit
def _numbers(code, CODING: tl.constexpr):
    """fp16 numbers of one-byte codes, those of fp8 (e4m3) 256 times too small: no GPU before sm_89 knows that type."""
    if CODING == _FP8:
        bits = code.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return code.to(tl.float16)


@triton.jit(do_not_specialize=["window", "sequences", "table_stride"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_numbers_ptr,
    k_scale_ptr,
    v_numbers_ptr,
    v_scale_ptr,
    out_ptr,
    top_ptr,
    sum_ptr,
    starts_ptr,
    kv_len_ptr,
    table_ptr,
    index_ptr,
    scale,
    cap,
    window,
    sequences,
    table_stride,
    q_stride_t,
    q_stride_h,
    k_stride_p,
    k_stride_b,
    k_stride_g,
    v_stride_p,
    v_stride_b,
    v_stride_g,
    GROUPS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_CODING: tl.constexpr,
    V_CODING: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (b, g, segment): the b-th piece of BLOCK_Q tokens, counted with one piece to spare per sequence.

    `scale` and `cap` bring scores to base 2: score * scale, or tanh(score * scale) * cap. Scales of codes go to scores
    and probabilities; a byte of int4 holds channels half a head apart, so that its two halves are two products.
    """
    g = tl.program_id(1)
    segment = tl.program_id(2)
    sequence, row, rows, skipped = part_of(starts_ptr, sequences, BLOCK_Q)
    if skipped >= rows:
        return
    flat, head, real_m, own = rows_of(index_ptr, row, rows, skipped, g, GROUP, BLOCK_M, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    real_d = d < WIDTH
    q_at = flat[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=real_m[:, None] & real_d[None, :], other=0.0)
    h = tl.arange(0, BLOCK_H)
    real_h = h < WIDTH // 2
    if K_CODING == _INT4:
        low_at = flat[:, None] * q_stride_t + head[:, None] * q_stride_h + h[None, :]
        q_low = tl.load(q_ptr + low_at, mask=real_m[:, None] & real_h[None, :], other=0.0)
        q_high = tl.load(q_ptr + low_at + WIDTH // 2, mask=real_m[:, None] & real_h[None, :], other=0.0)
        q_sum = tl.sum(q.to(tl.float32), 1)
    if K_CODING == _FP8:
        scale_of_keys = tl.load(k_scale_ptr + g) * 256
    if V_CODING == _FP8:
        scale_of_values = tl.load(v_scale_ptr + g) * 256

    end = tl.minimum(tl.load(kv_len_ptr + sequence), tl.max(own, 0) + 1)
    first = 0
    if WINDOW:
        first = tl.maximum(tl.min(tl.where(real_m, own, 2147483647), 0) - window + 1, 0)
    first_tile = first // BLOCK_N
    tiles = tl.cdiv(end, BLOCK_N) - first_tile
    share = tl.cdiv(tiles, SEGMENTS)
    begin = first_tile + segment * share
    stop = tl.minimum(begin + share, first_tile + tiles)

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if V_CODING == _INT4:
        acc_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        acc_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(begin, stop):
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = slot < end
        page = tl.load(table_ptr + sequence.to(tl.int64) * table_stride + slot // BLOCK, mask=stored, other=0)
        page = page.to(tl.int64)  # a pool of more than 2^31 elements is common
        k_at = page * k_stride_p + (slot % BLOCK) * k_stride_b + g * k_stride_g
        beside = page * PAGE_ROWS + (slot % BLOCK) * SLOT_ROWS + g  # of fp16 numbers, which lie close
        if K_CODING == _INT4:
            k = tl.load(k_ptr + k_at[None, :] + h[:, None], mask=stored[None, :] & real_h[:, None], other=0)
            score = tl.dot(q_low, _numbers(k & 15, K_CODING).to(q.dtype), input_precision="ieee")
            score += tl.dot(q_high, _numbers(k >> 4, K_CODING).to(q.dtype), input_precision="ieee")
            step = tl.load(k_numbers_ptr + 2 * beside, mask=stored, other=0.0).to(tl.float32)
            lowest = tl.load(k_numbers_ptr + 2 * beside + 1, mask=stored, other=0.0).to(tl.float32)
            score = (score * step[None, :] + q_sum[:, None] * lowest[None, :]) * scale
        else:
            k = tl.load(k_ptr + k_at[None, :] + d[:, None], mask=stored[None, :] & real_d[:, None], other=0)
            if K_CODING > 0:
                k = _numbers(k, K_CODING)
            score = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
            if K_CODING == _INT8:
                score *= tl.load(k_numbers_ptr + beside, mask=stored, other=0.0).to(tl.float32)[None, :]
            if K_CODING == _FP8:
                score *= scale_of_keys
        visible = seen_by(own, slot, stored, window, WINDOW)
        top, total, weight, fade = folded(score, visible, top, total, cap, SOFTCAP)
        v_at = page * v_stride_p + (slot % BLOCK) * v_stride_b + g * v_stride_g
        if V_CODING == _INT4:
            v = tl.load(v_ptr + v_at[:, None] + h[None, :], mask=stored[:, None] & real_h[None, :], other=0)
            step = tl.load(v_numbers_ptr + 2 * beside, mask=stored, other=0.0).to(tl.float32)
            lowest = tl.load(v_numbers_ptr + 2 * beside + 1, mask=stored, other=0.0).to(tl.float32)
            shift = tl.sum(weight * lowest[None, :], 1)[:, None]
            weight = (weight * step[None, :]).to(q.dtype)
            low, high = _numbers(v & 15, V_CODING).to(q.dtype), _numbers(v >> 4, V_CODING).to(q.dtype)
            acc_low = acc_low * fade[:, None] + tl.dot(weight, low, input_precision="ieee") + shift
            acc_high = acc_high * fade[:, None] + tl.dot(weight, high, input_precision="ieee") + shift
        else:
            v = tl.load(v_ptr + v_at[:, None] + d[None, :], mask=stored[:, None] & real_d[None, :], other=0)
            if V_CODING > 0:
                v = _numbers(v, V_CODING)
            if V_CODING == _INT8:
                weight *= tl.load(v_numbers_ptr + beside, mask=stored, other=0.0).to(tl.float32)[None, :]
            v = v.to(q.dtype)
            acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")

    place = flat * (GROUPS * GROUP) + head
    place, part = ended(top_ptr, sum_ptr, place, top, total, segment, real_m, SEGMENTS)
    if V_CODING == _FP8:
        part *= scale_of_values
    if V_CODING == _INT4:
        out_at = place[:, None] * WIDTH + h[None, :]
        seen = real_m[:, None] & real_h[None, :]
        tl.store(out_ptr + out_at, (acc_low * part[:, None]).to(out_ptr.dtype.element_ty), mask=seen)
        tl.store(out_ptr + out_at + WIDTH // 2, (acc_high * part[:, None]).to(out_ptr.dtype.element_ty), mask=seen)
    else:
        out_at = place[:, None] * WIDTH + d[None, :]
        acc = acc * part[:, None]
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=real_m[:, None] & real_d[None, :])
