"""Units: what is pruned as a whole (a channel, a head with its channels), and how many of them are to stay.

Shape suffixes: U units, C channels of a unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Units:
    """The input channels of each unit, [U, C]. `pool_U` says which pool each belongs to; of every pool `quota` stay."""

    columns_UC: Tensor
    pool_U: tuple[int, ...]
    quota: int

    @classmethod
    def alike(cls, count: int, size: int, keep: int) -> Units:
        """`count` units of `size` neighbouring channels in one pool."""
        return cls(torch.arange(count * size).view(count, size), (0,) * count, keep)

    @property
    def count(self) -> int:
        return len(self.pool_U)

    @property
    def keep(self) -> int:
        """How many stay in all."""
        return self.quota * len(set(self.pool_U))

    def channels(self, units: Sequence[int]) -> Tensor:
        """The channels of some units, one after the other."""
        return self.columns_UC[list(units)].flatten()

    def within(self, units: Sequence[int]) -> Units:
        """These units alone, when only their channels are left, numbered anew."""
        size = self.columns_UC.shape[1]
        pools = tuple(self.pool_U[unit] for unit in units)
        return replace(self, columns_UC=torch.arange(len(units) * size).view(-1, size), pool_U=pools)

    def best(self, score_U: Tensor) -> list[int]:
        """The units with the highest scores: the quota of every pool, ascending. Of equal ones the first stay."""
        gone = self.lowest(score_U, range(self.count), self.count - self.keep)
        return sorted(set(range(self.count)) - set(gone))

    def lowest(self, score_U: Tensor, among: Sequence[int], count: int) -> list[int]:
        """`count` units of `among` with the lowest scores [len(among)]; no pool falls below its quota."""
        order = torch.argsort(-score_U, stable=True).flip(0).tolist()
        room = Counter(self.pool_U[unit] for unit in among)
        found: list[int] = []
        for place in order:
            unit = among[place]
            pool = self.pool_U[unit]
            if len(found) < count and room[pool] > self.quota:
                room[pool] -= 1
                found.append(unit)
        return found
