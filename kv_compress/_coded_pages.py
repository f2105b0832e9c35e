"""Which tokens of a sequence lie in coded pages, and when they get there: whole numbers, no tensors.

The first tokens of a sequence (sinks) and the latest lie in full pages. Behind the sinks come blocks of as many tokens
as a coded page holds, or two: as many as fill whole full pages. Block m is coded once `recent` tokens behind it are
stored: a fixed position, so that every query sees the same mixture however a prompt was cut into chunks, batched,
preempted or found in a cache.

A coded page takes one entry of a sequence's table, as a full page does. Slots count entries: each coded page is `block`
of them, whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_compress._budget import WITHOUT_END, Point

BLOCK = 16  # tokens of a full page in the runtime, unless it is told otherwise
SINKS, RECENT = 4, 64  # tokens kept in full where keys are coded per channel, unless a recipe says otherwise
HALF_BYTES = 2  # of a number in bf16, in which the runtime may hold keys and values of any model


@dataclass(frozen=True, slots=True)
class CodingPoints:
    """`block` tokens lie in a full page, `page_tokens` in a coded one; `together` of these, which are coded at a time,
    hold what whole full pages hold. `sinks` (a multiple of block) first and at least `recent` last tokens lie in full
    pages. `salt` names the policy."""

    block: int
    page_tokens: int
    sinks: int
    recent: int
    salt: str
    together: int = 1

    @property
    def every(self) -> int:
        """Tokens from one point to the next."""
        return self.page_tokens * self.together

    @property
    def saved(self) -> int:
        """Slots that come back at a point."""
        return self.every - self.block * self.together

    def passed(self, position: int) -> int:
        """Points up to a position, its own included."""
        return max(0, (position - self.sinks - self.recent) // self.every)

    def coded(self, position: int) -> int:
        """Coded pages when the tokens before `position` are stored, and what is due there is coded."""
        return self.passed(position) * self.together

    def slots(self, position: int) -> int:
        """Slots that are taken then."""
        return position - self.passed(position) * self.saved

    def position(self, number: int) -> int:
        """The point of this number, from 1."""
        return self.sinks + number * self.every + self.recent

    def after(self, slots: int, position: int, prompt: int, end: int = WITHOUT_END) -> Point | None:
        """The first point behind `position`, the last point or 0, and no later than `end`; `slots` slots hold what is
        before it. The prompt's length is of no matter."""
        at = self.position(self.passed(position) + 1)
        stored = slots + at - position
        return Point(at, stored, stored - self.saved, 0) if at <= end else None

    def peak(self, slots: int, position: int, prompt: int, end: int) -> int:
        """The most slots taken at any time from `position`, the last point or 0, until all tokens before `end` are
        stored (a point at `end` comes after that)."""
        last = self.passed(end)
        before = self.position(last) - (last - 1) * self.saved if last > self.passed(position) else 0
        return max(before, self.slots(end))

    def longest(self, pages: int) -> int:
        """The most tokens of one sequence that so many pages hold, with all that is in them at any time before."""
        slots = pages * self.block
        passed = max(0, (slots - self.position(1)) // (self.block * self.together) + 1)
        return slots + passed * self.saved

    def entry(self, index: int, coded: int) -> tuple[bool, int]:
        """What entry `index` of a table holds while `coded` pages of the sequence are: whether it is a coded page, and
        which one (from 0), or which full page of the sequence (from 0)."""
        behind = index - self.sinks // self.block
        if 0 <= behind < coded:
            return True, behind
        return False, index if behind < 0 else index + coded // self.together * self.saved // self.block

    def sources(self, passed: int) -> range:
        """The entries of a table that become coded pages at the next point, if so many are passed."""
        first = self.sinks // self.block + passed * self.together
        return range(first, first + self.every // self.block)
