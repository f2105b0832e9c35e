"""How paged attention is cut into launches and programs, and how segments of a sequence's keys are joined.

Few decodes would leave most of a GPU idle: then a sequence's keys are shared out among SEGMENTS programs whose partial
results `_merge` joins. No grid depends on a sequence's length, so that graphs can be captured.

Shape suffixes: T tokens, H query heads, D head width, S sequences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages
from runtime.ops.triton.device import processors

LOG2_E = math.log2(math.e)
_MOST_SEGMENTS = 32


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
