"""Captured decode steps equal eager ones."""

from __future__ import annotations

import pytest
import torch

from runtime.graphs import DecodeGraphs
from runtime.ops.attention import AttentionBatch
from tests.gpu.toy import Toy

PAGES, BLOCK = 64, 16


def batch_of(lengths: list[int]) -> AttentionBatch:
    needed = [length // BLOCK + 1 for length in lengths]
    pages = iter(torch.randperm(PAGES - 1, generator=torch.Generator().manual_seed(len(lengths))).tolist())
    tables = [[next(pages) for _ in range(count)] for count in needed]
    return AttentionBatch.build(lengths, [1] * len(lengths), lengths, tables, block_size=BLOCK, device="cuda")


@pytest.mark.parametrize("lengths", [[0], [100], [5, 200, 33], [10] * 4, [1, 2, 3, 4, 50, 60, 70]])
def test_a_replayed_step_equals_the_eager_one(lengths: list[int]) -> None:
    toy = Toy(layers=2, hidden=256, heads=8, groups=2, pages=PAGES, block=BLOCK)
    graphs = DecodeGraphs(
        toy.forward, pages=16, trash_page=PAGES - 1, block_size=BLOCK, device=torch.device("cuda"), sizes=(1, 2, 4, 8)
    )
    toy.fill()
    batch = batch_of(lengths)
    ids = torch.arange(len(lengths), device="cuda")
    assert graphs.covers(batch)
    before = [pool.clone() for pool in toy.pools]
    eager = toy.forward(ids, batch)
    after = [pool.clone() for pool in toy.pools]
    for pool, old in zip(toy.pools, before, strict=True):
        pool.copy_(old)
    replayed = graphs.run(ids, batch, torch.arange(len(ids), device=ids.device))
    assert torch.allclose(replayed, eager, rtol=1e-2, atol=1e-2)  # keys may be split among another number of programs
    for pool, wanted in zip(toy.pools, after, strict=True):
        assert torch.allclose(pool[:, : PAGES - 1], wanted[:, : PAGES - 1], rtol=1e-2, atol=1e-2)


def test_what_no_graph_covers() -> None:
    toy = Toy(layers=1, hidden=64, heads=2, groups=1, pages=PAGES, block=BLOCK)
    graphs = DecodeGraphs(
        toy.forward, pages=4, trash_page=PAGES - 1, block_size=BLOCK, device=torch.device("cuda"), sizes=(1, 2)
    )
    assert not graphs.covers(batch_of([1, 2, 3]))
    assert not graphs.covers(batch_of([100]))
    prefill = AttentionBatch.build([0], [2], [0], [[0]], block_size=BLOCK, device="cuda")
    assert not graphs.covers(prefill)
    assert graphs.bytes > 0
