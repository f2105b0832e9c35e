"""Attention over full and coded pages in one table, on every route of a CPU, against dense attention over what the
codes mean."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import pytest
import torch

from runtime.native.library import library
from runtime.ops.attention import paged_attention
from runtime.ops.backend import torch_only
from runtime.ops.batch import AttentionBatch
from runtime.ops.kv_store import store_kv
from tests.runtime.ops.mixtures import BLOCK, KINDS, mixture
from tests.runtime.ops.paged import dense

PARTS = [(0, 1), (3, 9), (29, 1), (30, 1), (31, 4), (1200, 1), (67, 50), (49, 2)]  # around points: 30, 50, …
SETTINGS = [{}, {"window": 23}, {"softcap": 2.0}]


@pytest.mark.parametrize(
    ("route", "kind"), [*product(["exact", "torch"], ["int4", "tokens"]), *product(["native"], KINDS)]
)
def test_attention_is_that_over_the_numbers_that_codes_mean(route: str, kind: str) -> None:
    if route == "native" and library().loaded is None:
        pytest.skip("needs a C compiler")
    for width, settings in zip((16, 24, 64), SETTINGS, strict=True):
        paged, k, v, batch = mixture(PARTS, kind, heads=6, groups=2, width=width, page_tokens=20 + width)
        with torch_only() if route == "torch" else nullcontext():
            out = paged_attention(paged.q_THD, k, v, batch, scale=0.25, exact=route == "exact", **settings)
        assert (out - dense(paged, scale=0.25, **settings)).abs().max() < 2e-5


def test_exact_rows_do_not_depend_on_the_batch() -> None:
    paged, k, v, batch = mixture([(100, 1), (31, 1), (260, 1)], "int4")
    together = paged_attention(paged.q_THD, k, v, batch, scale=0.25, exact=True)
    for s, (stored, new) in enumerate(paged.parts):
        coded = int(batch.coded_S[s])
        alone = AttentionBatch.build(
            [stored], [new], [stored - coded * 16], [batch.table_SP[s].tolist()], block_size=BLOCK, frames=batch.frames
        )
        assert torch.equal(paged_attention(paged.q_THD[s : s + 1], k, v, alone, scale=0.25, exact=True)[0], together[s])


@pytest.mark.parametrize("route", ["torch", "native"])
def test_new_tokens_go_into_full_pages(route: str) -> None:
    _, k, v, batch = mixture([(53, 2), (9, 3)], "int4")
    x, y = (torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    before = [pages.codes.clone() for pages in (k, v)]
    with torch_only() if route == "torch" else nullcontext():
        store_kv(x, y, k, v, batch.slot_T)
    # 53 tokens: the sinks, 2 coded pages, 9 tokens in full: the new ones lie in entries 5 and 5 of the table.
    table = batch.table_SP.tolist()
    places = [(table[0][5], 1), (table[0][5], 2), (table[1][2], 1), (table[1][2], 2), (table[1][2], 3)]
    for pages, numbers, old in zip((k, v), (x, y), before, strict=True):
        for row, place in enumerate(places):
            assert torch.equal(pages.codes[place], numbers[row])
            old[place] = numbers[row]
        assert torch.equal(pages.codes.view(torch.int32), old.view(torch.int32))
