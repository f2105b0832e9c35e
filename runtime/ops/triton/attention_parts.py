"""What the kernels of paged attention have in common: a program's queries, the running maximum and sum, its result.

Shape suffixes: M rows of a program (tokens times heads of a group), N keys of a tile.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)  # running maximum before any key was seen: finite, so that differences are never NaN


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


@triton.jit
def part_of(starts_ptr, sequences, BLOCK_Q: tl.constexpr):
    """The program's sequence, the flat row of its first token, how many it has, and those in other programs before."""
    piece = tl.program_id(0)
    base = tl.load(starts_ptr)
    sequence = _sequence_of(starts_ptr, piece, base, sequences, BLOCK_Q)
    row = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - row
    skipped = (piece - (row - base) // BLOCK_Q - sequence) * BLOCK_Q
    return sequence, row, rows, skipped


@triton.jit
def rows_of(index_ptr, row, rows, skipped, g, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Flat row and head of each of the program's rows, whether there is one, and its slot in the sequence (or -1)."""
    m = tl.arange(0, BLOCK_M)
    token = skipped + m // GROUP
    real_m = (m // GROUP < BLOCK_Q) & (token < rows)
    flat = (row + token).to(tl.int64)
    head = g * GROUP + m % GROUP
    return flat, head, real_m, tl.load(index_ptr + flat, mask=real_m, other=-1).to(tl.int32)


@triton.jit
def seen_by(own, slot, stored, window, WINDOW: tl.constexpr):
    """Which keys, at these slots, each row sees."""
    visible = stored[None, :] & (slot[None, :] <= own[:, None])
    if WINDOW:
        visible = visible & (slot[None, :] > own[:, None] - window)
    return visible


@triton.jit
def folded(score, visible, top, total, cap, SOFTCAP: tl.constexpr):
    """A tile's scores folded into the running maximum and sum: those, the tile's weights, and what fades the rest."""
    if SOFTCAP:
        score = _tanh(score) * cap
    score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, total * fade + tl.sum(weight, 1), weight, fade


@triton.jit
def ended(top_ptr, sum_ptr, place, top, total, segment, real_m, SEGMENTS: tl.constexpr):
    """Where a program's rows go in the result, or in the room of their segment beside their maximum and sum; and what
    they are multiplied by."""
    if SEGMENTS == 1:
        part = 1.0 / tl.where(total > 0, total, 1.0)
    else:
        place = place * SEGMENTS + segment
        part = tl.full(total.shape, 1.0, tl.float32)
        tl.store(top_ptr + place, top, mask=real_m)
        tl.store(sum_ptr + place, total, mask=real_m)
    return place, part
