"""What a sequence holds where a policy evicts, and how many of them, and how long ones, a pool has room for: whole
numbers, no tensors."""

from __future__ import annotations

from kv_compress._budget import WITHOUT_END, Points


def held(points: Points, prompt: int) -> int:
    """Slots behind a prompt of so many tokens, what unequal counts may waste included."""
    slots, position = 0, 0
    while (point := points.after(slots, position, prompt, prompt)) is not None:
        slots, position = point.kept, point.position
    return slots + prompt - position + (points.spread if position else 0)


def at_once(points: Points, prompt: int, pages: int, block: int) -> int:
    """Sequences behind prompts of so many tokens that a pool holds, read one after the other: all but the last hold
    what stays, the last needs its peak."""
    peak, kept = (-(-slots // block) for slots in (points.peak(0, 0, prompt, prompt), held(points, prompt)))
    return 0 if peak > pages else (pages - peak) // kept + 1


def longest(points: Points, pages: int, block: int) -> int | None:
    """Tokens of the longest prompt that a pool takes when it is alone; None if there is no end."""
    room, end = pages * block, WITHOUT_END // 2
    slots = position = waste = before = 0
    while (point := points.after(slots, position, WITHOUT_END, end)) is not None and point.slots + waste <= room:
        if points.tokens is not None and (point.slots, point.kept) == (before, slots):
            return None  # from here on every stretch is like the last one
        before, slots, position, waste = point.slots, point.kept, point.position, points.spread
    return position + max(0, room - waste - slots)
