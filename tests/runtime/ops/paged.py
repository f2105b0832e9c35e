"""Random paged batches and dense attention over the same keys, written without the product's ideas.

Imports nothing but torch and the batch, so that it also serves tests that run without pytest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.ops.batch import AttentionBatch


@dataclass
class Paged:
    """A batch over pools whose unused slots hold NaN, and each sequence's keys and values in a row."""

    q_THD: torch.Tensor
    k_PBGD: torch.Tensor
    v_PBGD: torch.Tensor
    batch: AttentionBatch
    keys: list[torch.Tensor]  # [length, G, D] of each sequence
    values: list[torch.Tensor]
    parts: list[tuple[int, int]]  # stored before, new

    def to(self, device: str) -> Paged:
        """The same on another device."""
        tables = self.batch.table_SP.tolist()
        stored, new = zip(*self.parts, strict=True)
        batch = AttentionBatch.build(stored, new, stored, tables, block_size=self.k_PBGD.shape[1], device=device)
        moved = (x.to(device) for x in (self.q_THD, self.k_PBGD, self.v_PBGD))
        return Paged(*moved, batch, self.keys, self.values, self.parts)


def make(
    parts: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    block: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Paged:
    """Each sequence has (stored, new) tokens; this step's keys are already in its pages, which lie in random order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [stored + new for stored, new in parts]
    needed = [-(-length // block) for length in lengths]
    pages = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    shape = (len(pages), block, groups, width)
    k_pool, v_pool = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    tables, keys, values = [], [], []
    for length, count in zip(lengths, needed, strict=True):
        table = [pages.pop() for _ in range(count)]
        k, v = (torch.randn(length, groups, width, generator=generator).to(dtype) for _ in range(2))
        for slot in range(length):
            k_pool[table[slot // block], slot % block] = k[slot]
            v_pool[table[slot // block], slot % block] = v[slot]
        tables.append(table)
        keys.append(k)
        values.append(v)
    stored, new = zip(*parts, strict=True)
    q = torch.randn(sum(new), heads, width, generator=generator).to(dtype)
    batch = AttentionBatch.build(stored, new, stored, tables, block_size=block)
    return Paged(q, k_pool, v_pool, batch, keys, values, list(parts))


def dense(paged: Paged, *, scale: float, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    """Attention in fp64, one query and head at a time: [T, H, D]."""
    out = torch.empty(paged.q_THD.shape, dtype=torch.float64)
    heads, row = paged.q_THD.shape[1], 0
    for (stored, new), keys, values in zip(paged.parts, paged.keys, paged.values, strict=True):
        repeats = heads // keys.shape[1]
        for position in range(stored, stored + new):
            oldest = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                k = keys[oldest : position + 1, head // repeats].double()
                v = values[oldest : position + 1, head // repeats].double()
                score = (k @ paged.q_THD[row, head].double()) * scale
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                out[row, head] = torch.softmax(score, 0) @ v
            row += 1
    return out
