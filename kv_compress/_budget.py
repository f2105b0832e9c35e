"""Where in a sequence keys and values are evicted, and how many are left: whole numbers, no tensors.

A point is a logical position: once the tokens before it are stored, each layer and head drops all but `kept` slots.
All that is told here follows from the tokens' number, the prompt's length and the policy, so it can be worked out
before anything is computed, and comes out the same however a prompt was cut into chunks, batched or started over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

WITHOUT_END = 1 << 62


class Point(NamedTuple):
    """An eviction: at `position`, where `slots` are stored, `kept` stay; scored with the last `queries` queries."""

    position: int
    slots: int
    kept: int
    queries: int


@dataclass(frozen=True, slots=True)
class Points:
    """When a policy evicts, and how much it keeps.

    `prompt_every`, `decode_every`: tokens from one point to the next within the prompt and behind it, 0 for none there.
    `prompt_end`: whether the prompt's end is a point. `tokens` stay at a point, or `ratio` of the tokens so far;
    `least` in any case. `window`: queries observed at points of the prompt, of decodes the last one is (0: none are).
    `seeded`: scores are drawn by lot from the tokens. `salt` names the policy: what it leaves is like no other's.

    `layers` and `heads` above 0: each layer and head keeps a number of slots of its own, of which all told here is the
    mean; `beta`: how budgets fall over layers (0: not at all). `spread`: slots that the pages of unequal counts may
    waste, a page less one; the scheduler fills it in. `alone`: pages are a sequence's own from the beginning, since
    they hold what its own queries attended to.
    """

    prompt_every: int
    prompt_end: bool
    decode_every: int
    tokens: int | None
    ratio: float
    least: int
    window: int
    seeded: bool
    salt: str
    layers: int = 0
    heads: int = 0
    beta: float = 0.0
    spread: int = 0
    alone: bool = False

    def after(self, slots: int, position: int, prompt: int, end: int = WITHOUT_END) -> Point | None:
        """The first point behind `position`, and no later than `end`, at which anything is evicted, if `slots` slots
        hold the tokens before `position`, which is the last point or 0; the prompt has `prompt` tokens."""
        at = self._next(position, prompt)
        while at is not None and at <= end:
            stored = slots + at - position
            kept = self.kept(at)
            if kept < stored:
                queries = min(self.window, at - position if at <= prompt else 1)
                return Point(at, stored, kept, queries)
            at = self._next(at, prompt)
        return None

    def kept(self, position: int) -> int:
        """Slots that stay at a point, if there are more."""
        return max(self.least, self.tokens if self.tokens is not None else ceil(self.ratio * position))

    def peak(self, slots: int, position: int, prompt: int, end: int) -> int:
        """The most slots taken at any time from the last point, after which `slots` slots hold what was before
        `position`, until all tokens before `end` are stored (a point at `end` comes after that). Behind a point what
        unequal counts may waste is part of it."""
        return _peak(self, slots, position, prompt, end)

    def budgets(self, kept: int, stored: Sequence[int]) -> tuple[int, ...]:
        """Slots that stay in each head of each layer, in the mean of its heads, if `stored` are there."""
        return falling(kept, self.least, stored, self.beta) if self.beta else (kept,) * len(stored)

    def _next(self, position: int, prompt: int) -> int | None:
        if position < prompt:
            inside = position - position % self.prompt_every + self.prompt_every if self.prompt_every else prompt
            if inside < prompt:
                return inside
            if self.prompt_end:
                return prompt
            position = prompt
        if not self.decode_every:
            return None
        return position + self.decode_every - (position - prompt) % self.decode_every


@lru_cache(maxsize=4096)
def _peak(points: Points, slots: int, position: int, prompt: int, end: int) -> int:
    most, waste = 0, points.spread if slots < position else 0
    while (point := points.after(slots, position, prompt, end)) is not None:
        most = max(most, point.slots + waste)
        slots, position, waste = point.kept, point.position, points.spread
    return max(most, slots + end - position + waste)


def falling(kept: int, least: int, stored: Sequence[int], beta: float) -> tuple[int, ...]:
    """Slots that stay in each head of each layer, `kept` in the mean, if `stored` are there, as PyramidKV wants it
    (arXiv:2406.02069). What always stays (`least`) is in all of them; of the rest the last layer gets 1 / beta of the
    mean, unless the first would get more than it has. Whole numbers whose sum is that of equal budgets, so that what is
    stored in all is known beforehand."""
    count, rest = len(stored), kept - least
    highest = min(rest * (2 - 1 / beta), max(stored) - least)
    fall = 2 * (highest - rest) / max(count - 1, 1)
    wanted = [least + highest - fall * layer for layer in range(count)] if count > 1 else [float(kept)]
    found = [min(int(share), has) for share, has in zip(wanted, stored, strict=True)]
    in_line = sorted(range(count), key=lambda layer: int(wanted[layer]) - wanted[layer])
    left = kept * count - sum(found)
    while left > 0:  # what was rounded off, or is not there in a layer, goes to others
        open_ = [layer for layer in in_line if found[layer] < stored[layer]]
        for layer in open_[: max(left, 1)]:
            more = min(max(left // len(open_), 1), stored[layer] - found[layer], left)
            found[layer] += more
            left -= more
    return tuple(found)
