"""Paged attention in Triton: one kernel for prefill chunks and decodes, and a reduce for decodes with split keys.

A program owns the query heads of one key-value head and several tokens of one sequence: packed, they fill the rows of
one product, and each key is read once per group (Kwon et al., 2023, arXiv:2309.06180; Dao et al., 2022,
arXiv:2205.14135). Few decodes would leave most of a GPU idle: then a sequence's keys are shared out among SEGMENTS
programs whose partial results `_merge` joins. No grid depends on a sequence's length, so that graphs can be captured.

Shape suffixes: T tokens, H query heads, G key-value heads, D head width, P pages, B slots of a page. In the kernels:
M rows of a program (tokens times heads of a group), N keys of a tile.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages, as_pages
from runtime.ops.triton.device import processors

_LOG2_E = math.log2(math.e)
_MOST_SEGMENTS = 32
CODINGS = {"full": 0, "int8": 1, "int4": 2, "fp8": 3}
_INT8, _INT4, _FP8 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_FLOOR = tl.constexpr(-1e30)  # running maximum before any key was seen: finite, so that differences are never NaN


@dataclass(frozen=True)
class Tile:
    """How one launch is cut: rows of queries, keys of a tile, warps, pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def tile_for(*, decode: bool, group: int, width: int, element_bytes: int) -> Tile:
    """Shapes that fit the shared memory of every GPU since sm_80, chosen without timing anything."""
    wide = triton.next_power_of_2(width) * element_bytes > 256
    m = max(16, triton.next_power_of_2(group))
    if decode:
        return Tile(m, n=32 if wide else 64, warps=4, stages=2 if wide else 3)
    if element_bytes > 2:
        return Tile(max(m, 32), n=16 if wide else 32, warps=4, stages=2)
    return Tile(max(m, 64), n=32 if wide else 64, warps=4, stages=2)


def segments_for(programs: int, max_kv: int, processors: int) -> int:
    """A power of two: enough programs for two on every processor, unless the keys are few."""
    wanted = min(2 * processors // max(programs, 1), max_kv // 256, _MOST_SEGMENTS)
    return 1 << max(wanted, 1).bit_length() - 1


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


def in_launches(
    launch: Callable[..., None],
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    batch: AttentionBatch,
    segments: int | None,
    *how: float | None,
) -> torch.Tensor:
    """The result of `launch(out, q, k, v, batch, first, end, segments, *how)`, which does sequences first … end - 1:
    once for decodes, once for chunks."""
    q_THD = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    decodes, sequences = batch.decodes, len(batch.kv_len)
    if decodes:
        if segments is None:
            segments = segments_for(decodes * k.groups, batch.max_kv, processors(q_THD.device))
        launch(out_THD, q_THD, k, v, batch, 0, decodes, segments, *how)
    if decodes < sequences:
        launch(out_THD, q_THD, k, v, batch, decodes, sequences, 1, *how)
    return out_THD


def room_for(out_THD: torch.Tensor, segments: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where segments put their results, largest scores and sums; the result itself where there is but one."""
    if segments == 1:
        return out_THD, out_THD, out_THD
    tokens, heads, width = out_THD.shape
    part = torch.empty((tokens, heads, segments, width), dtype=torch.float32, device=out_THD.device)
    top, total = torch.empty((2, tokens, heads, segments), dtype=torch.float32, device=out_THD.device)
    return part, top, total


def join(
    out_THD: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    starts_S1: torch.Tensor,
    queries: int,
    segments: int,
) -> None:
    """What segments have left in the room for it becomes the result, for so many queries from the first start on."""
    if segments == 1:
        return
    heads, width = out_THD.shape[1:]
    _merge[(queries, heads)](
        out_THD,
        *parts,
        starts_S1,
        HEADS=heads,
        WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        SEGMENTS=segments,
    )


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
        scale * _LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
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


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))  # 2 log2(e); right at both infinities


@triton.jit
def _sequence_of(starts_ptr, piece, base, sequences, BLOCK_Q: tl.constexpr):
    """The last sequence whose first piece is not past this one."""
    sequence = tl.full([], 0, tl.int32)
    above = sequences
    while above - sequence > 1:
        middle = (sequence + above) // 2
        opens = (tl.load(starts_ptr + middle) - base) // BLOCK_Q + middle
        sequence = tl.where(opens <= piece, middle, sequence)
        above = tl.where(opens <= piece, above, middle)
    return sequence


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
    piece = tl.program_id(0)
    g = tl.program_id(1)
    segment = tl.program_id(2)
    base = tl.load(starts_ptr)
    sequence = _sequence_of(starts_ptr, piece, base, sequences, BLOCK_Q)
    row = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - row
    skipped = (piece - (row - base) // BLOCK_Q - sequence) * BLOCK_Q
    if skipped >= rows:
        return

    m = tl.arange(0, BLOCK_M)
    token = skipped + m // GROUP
    real_m = (m // GROUP < BLOCK_Q) & (token < rows)
    flat = (row + token).to(tl.int64)
    head = g * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    real_d = d < WIDTH
    q_at = flat[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=real_m[:, None] & real_d[None, :], other=0.0)
    own = tl.load(index_ptr + flat, mask=real_m, other=-1).to(tl.int32)
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

    top = tl.full([BLOCK_M], _FLOOR, tl.float32)
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
        if SOFTCAP:
            score = _tanh(score) * cap
        visible = stored[None, :] & (slot[None, :] <= own[:, None])
        if WINDOW:
            visible = visible & (slot[None, :] > own[:, None] - window)
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
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
        top = higher

    place = flat * (GROUPS * GROUP) + head
    part = tl.full([BLOCK_M], 1.0, tl.float32)
    if SEGMENTS == 1:
        part = 1.0 / tl.where(total > 0, total, 1.0)
    else:
        place = place * SEGMENTS + segment
        tl.store(top_ptr + place, top, mask=real_m)
        tl.store(sum_ptr + place, total, mask=real_m)
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


@triton.jit
def _merge(
    out_ptr,
    part_ptr,
    top_ptr,
    sum_ptr,
    starts_ptr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Program (t, h): join the segments of one token and head."""
    token = tl.load(starts_ptr) + tl.program_id(0)
    place = token.to(tl.int64) * HEADS + tl.program_id(1)
    segment = tl.arange(0, SEGMENTS)
    d = tl.arange(0, BLOCK_D)
    top = tl.load(top_ptr + place * SEGMENTS + segment)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sum_ptr + place * SEGMENTS + segment), 0)
    part_at = (place * SEGMENTS + segment)[:, None] * WIDTH + d[None, :]
    part = tl.load(part_ptr + part_at, mask=(d < WIDTH)[None, :], other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + place * WIDTH + d, out.to(out_ptr.dtype.element_ty), mask=d < WIDTH)
