"""Paged attention in Triton where some pages are coded as a whole: keys per channel, values per token, int8 or int4.

As in attention.py, a program owns the query heads of one key-value head and several tokens of one sequence, and few
decodes are shared out. Its keys come in two ranges, tiles of full pages and tiles of coded ones: no tile holds both,
nor parts of two coded pages. Scales and lowest numbers of a page's channels go to the queries (Liu et al., 2024,
arXiv:2402.02750), those of values to probabilities. A head's channels are done in halves, as a byte of int4 holds them.
With a sliding window, tiles in front of it are read, too, and masked.

Shape suffixes: T tokens, H query heads, D head width; in the kernel M rows of a program, N keys of a tile, E channels
of half a head.
"""

import torch
import triton
import triton.language as tl

from runtime.ops.batch import AttentionBatch
from runtime.ops.coded_pages import CodedPages
from runtime.ops.pages import Pages
from runtime.ops.triton.attention_launch import LOG2_E, in_launches, join, room_for, tile_for
from runtime.ops.triton.attention_parts import FLOOR, ended, folded, part_of, rows_of, seen_by

BITS = {"int8": 8, "int4": 4}


def takes(k: Pages, v: Pages) -> bool:
    """Whether the kernel reads these coded pages."""
    kinds = (k.coded, True), (v.coded, False)
    return all(of is not None and of.codec in BITS and of.channels == channels for of, channels in kinds)


def attend(
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    segments: int | None = None,
) -> torch.Tensor:
    """`paged_attention` over frames that `takes` allows; see attention.attend for the rest."""
    return in_launches(_launch, q_THD, k, v, batch, segments, scale, window, softcap)


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
    if k.coded is None or v.coded is None or batch.frames is None or batch.coded_S is None:
        raise ValueError("these pages hold no coded ones")
    heads, width = q_THD.shape[1:]
    group = heads // k.groups
    queries = batch.starts[end] - batch.starts[first]
    tile = tile_for(decode=queries == end - first, group=group, width=width, element_bytes=q_THD.element_size())
    block_q = tile.m // group
    block_e = max(16, triton.next_power_of_2((width + 1) // 2))
    parts = room_for(out_THD, segments)
    _attend_frames[(queries // block_q + end - first, k.groups, segments)](
        q_THD,
        k.codes,
        v.codes,
        *_parts(k.coded),
        *_parts(v.coded),
        *parts,
        batch.starts_S1[first:],
        batch.kv_len_S[first:],
        batch.table_SP[first:],
        batch.coded_S[first:],
        batch.index_T,
        scale * LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        0 if window is None else window,
        end - first,
        batch.table_SP.stride(0),
        q_THD.stride(0),
        q_THD.stride(1),
        k.codes.stride(0),
        v.codes.stride(0),
        *(part.stride(0) for part in (*_parts(k.coded), *_parts(v.coded))),
        GROUPS=k.groups,
        GROUP=group,
        WIDTH=width,
        BLOCK=k.block,
        SINKS=batch.frames.sinks,
        PAGE=batch.frames.page_tokens,
        BLOCK_E=block_e,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_Q=block_q,
        SEGMENTS=segments,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        K_BITS=BITS[k.coded.codec],
        V_BITS=BITS[v.coded.codec],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    join(out_THD, parts, batch.starts_S1[first:], queries, segments)


def _parts(coded: CodedPages) -> tuple[torch.Tensor, torch.Tensor]:
    if coded.numbers is None:
        raise ValueError(f"coded pages of {coded.codec} without their numbers")
    return coded.codes, coded.numbers


@triton.jit
def _halves(ptr, at, e, real, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of both halves of a head at the offsets `at`, as numbers."""
    code = tl.load(ptr + at + e, mask=real, other=0)
    if BITS == 4:
        low, high = code & 15, code >> 4
    else:
        low, high = code, tl.load(ptr + at + HALF + e, mask=real, other=0)
    return low.to(tl.float16).to(DTYPE), high.to(tl.float16).to(DTYPE)


@triton.jit(do_not_specialize=["window", "sequences", "table_stride"])
def _attend_frames(
    q_ptr,
    k_ptr,
    v_ptr,
    k_codes_ptr,
    k_numbers_ptr,
    v_codes_ptr,
    v_numbers_ptr,
    out_ptr,
    top_ptr,
    sum_ptr,
    starts_ptr,
    kv_len_ptr,
    table_ptr,
    coded_ptr,
    index_ptr,
    scale,
    cap,
    window,
    sequences,
    table_stride,
    q_stride_t,
    q_stride_h,
    k_stride,
    v_stride,
    k_codes_stride,
    k_numbers_stride,
    v_codes_stride,
    v_numbers_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
):
    """Program (b, g, segment), as in attention._attend. `*_stride`: from one page to the next."""
    HALF: tl.constexpr = WIDTH // 2
    K_CODES: tl.constexpr = WIDTH * K_BITS // 8
    V_CODES: tl.constexpr = WIDTH * V_BITS // 8
    V_NUMBERS: tl.constexpr = 2 if V_BITS == 4 else 1
    PAGE_TILES: tl.constexpr = (PAGE + BLOCK_N - 1) // BLOCK_N
    SINK_TILES: tl.constexpr = (SINKS + BLOCK_N - 1) // BLOCK_N
    g = tl.program_id(1)
    segment = tl.program_id(2)
    sequence, row, rows, skipped = part_of(starts_ptr, sequences, BLOCK_Q)
    if skipped >= rows:
        return
    flat, head, real_m, own = rows_of(index_ptr, row, rows, skipped, g, GROUP, BLOCK_M, BLOCK_Q)
    e = tl.arange(0, BLOCK_E)
    real_e = e < HALF
    real_me = real_m[:, None] & real_e[None, :]
    q_at = flat[:, None] * q_stride_t + head[:, None] * q_stride_h + e[None, :]
    q_low = tl.load(q_ptr + q_at, mask=real_me, other=0.0)
    q_high = tl.load(q_ptr + q_at + HALF, mask=real_me, other=0.0)

    coded = tl.load(coded_ptr + sequence)
    past = SINKS + coded * PAGE  # tokens before the latest full pages
    end = tl.minimum(tl.load(kv_len_ptr + sequence), tl.max(own, 0) + 1)
    full_tiles = SINK_TILES + tl.cdiv(tl.maximum(end - past, 0), BLOCK_N)
    tiles = full_tiles + coded * PAGE_TILES
    share = tl.cdiv(tiles, SEGMENTS)
    begin = segment * share
    stop = tl.minimum(begin + share, tiles)
    table = table_ptr + sequence.to(tl.int64) * table_stride

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_low = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    acc_high = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for tile in range(begin, tl.minimum(stop, full_tiles)):
        is_sink = tile < SINK_TILES
        position = tl.where(is_sink, tile * BLOCK_N, past + (tile - SINK_TILES) * BLOCK_N) + n
        stored = position < tl.where(is_sink, tl.minimum(end, SINKS), end)
        slot = tl.where(is_sink, position, position - coded * (PAGE - BLOCK))
        page = tl.load(table + slot // BLOCK, mask=stored, other=0).to(tl.int64)
        inside = (slot % BLOCK) * (GROUPS * WIDTH) + g * WIDTH
        k_at = (page * k_stride + inside)[None, :] + e[:, None]
        real_en = stored[None, :] & real_e[:, None]
        k_low = tl.load(k_ptr + k_at, mask=real_en, other=0.0).to(q_low.dtype)
        k_high = tl.load(k_ptr + k_at + HALF, mask=real_en, other=0.0).to(q_low.dtype)
        score = tl.dot(q_low, k_low, input_precision="ieee") + tl.dot(q_high, k_high, input_precision="ieee")
        visible = seen_by(own, position, stored, window, WINDOW)
        top, total, weight, fade = folded(score * scale, visible, top, total, cap, SOFTCAP)
        v_at = (page * v_stride + inside)[:, None] + e[None, :]
        real_ne = stored[:, None] & real_e[None, :]
        v_low = tl.load(v_ptr + v_at, mask=real_ne, other=0.0).to(q_low.dtype)
        v_high = tl.load(v_ptr + v_at + HALF, mask=real_ne, other=0.0).to(q_low.dtype)
        weight = weight.to(q_low.dtype)
        acc_low = acc_low * fade[:, None] + tl.dot(weight, v_low, input_precision="ieee")
        acc_high = acc_high * fade[:, None] + tl.dot(weight, v_high, input_precision="ieee")
    for tile in range(tl.maximum(begin, full_tiles), stop):
        number = (tile - full_tiles) // PAGE_TILES
        offset = (tile - full_tiles) % PAGE_TILES * BLOCK_N + n
        position = SINKS + number * PAGE + offset
        stored = offset < PAGE
        page = tl.load(table + SINKS // BLOCK + number).to(tl.int64)
        k_numbers = k_numbers_ptr + page * k_numbers_stride + g * WIDTH + e
        lowest = k_numbers + GROUPS * WIDTH
        scale_low = tl.load(k_numbers, mask=real_e, other=0.0).to(tl.float32)
        scale_high = tl.load(k_numbers + HALF, mask=real_e, other=0.0).to(tl.float32)
        lowest_low = tl.load(lowest, mask=real_e, other=0.0).to(tl.float32)
        lowest_high = tl.load(lowest + HALF, mask=real_e, other=0.0).to(tl.float32)
        k_at = (page * k_codes_stride + offset * (GROUPS * K_CODES) + g * K_CODES)[None, :]
        k_low, k_high = _halves(
            k_codes_ptr, k_at, e[:, None], stored[None, :] & real_e[:, None], HALF, K_BITS, q_low.dtype
        )
        score = tl.dot((q_low * scale_low[None, :]).to(q_low.dtype), k_low, input_precision="ieee")
        score += tl.dot((q_high * scale_high[None, :]).to(q_low.dtype), k_high, input_precision="ieee")
        shift = tl.sum(q_low * lowest_low[None, :] + q_high * lowest_high[None, :], 1)
        visible = seen_by(own, position, stored, window, WINDOW)
        score = (score + shift[:, None]) * scale
        top, total, weight, fade = folded(score, visible, top, total, cap, SOFTCAP)
        beside = page * v_numbers_stride + (offset * GROUPS + g) * V_NUMBERS
        acc_low = acc_low * fade[:, None]
        acc_high = acc_high * fade[:, None]
        if V_BITS == 4:
            least = tl.load(v_numbers_ptr + beside + 1, mask=stored, other=0.0).to(tl.float32)
            added = tl.sum(weight * least[None, :], 1)[:, None]
            acc_low += added
            acc_high += added
        step = tl.load(v_numbers_ptr + beside, mask=stored, other=0.0).to(tl.float32)
        weight = (weight * step[None, :]).to(q_low.dtype)
        v_at = (page * v_codes_stride + offset * (GROUPS * V_CODES) + g * V_CODES)[:, None]
        v_low, v_high = _halves(
            v_codes_ptr, v_at, e[None, :], stored[:, None] & real_e[None, :], HALF, V_BITS, q_low.dtype
        )
        acc_low += tl.dot(weight, v_low, input_precision="ieee")
        acc_high += tl.dot(weight, v_high, input_precision="ieee")

    place = flat * (GROUPS * GROUP) + head
    place, part = ended(top_ptr, sum_ptr, place, top, total, segment, real_m, SEGMENTS)
    out_at = place[:, None] * WIDTH + e[None, :]
    tl.store(out_ptr + out_at, (acc_low * part[:, None]).to(out_ptr.dtype.element_ty), mask=real_me)
    tl.store(out_ptr + out_at + HALF, (acc_high * part[:, None]).to(out_ptr.dtype.element_ty), mask=real_me)
