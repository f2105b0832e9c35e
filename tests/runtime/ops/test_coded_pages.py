"""Attention over coded pages against dense attention over what the codes mean, on every route of a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from kv_compress._coding import code_dtype, round_trip
from kv_compress.policy import CODECS
from runtime.native.library import library
from runtime.ops.attention import paged_attention
from runtime.ops.backend import torch_only
from runtime.ops.kv_store import store_kv, store_reference
from runtime.ops.pages import Pages
from tests.runtime.ops.paged import Paged, dense, make

SCALE_G = torch.tensor([0.01, 0.02])
PARTS = [(70, 1), (3, 1), (1100, 1), (33, 40), (0, 20), (200, 3)]
SETTINGS = [{}, {"window": 40}, {"softcap": 2.0}]


def empty(paged: Paged, codec: str) -> Pages:
    """Pages for codes, of the shape of the batch's own pools."""
    pages, block, groups, width = paged.k_PBGD.shape
    if codec == "full":
        return Pages(torch.zeros_like(paged.k_PBGD))
    of = CODECS[codec]
    codes = torch.full((pages, block, groups, of.code_bytes(width)), 77).to(code_dtype(codec))
    numbers = torch.full((pages, block, groups, of.numbers), torch.nan, dtype=torch.float16) if of.numbers else None
    return Pages(codes, codec, numbers, None if of.numbers else SCALE_G[:groups])


def fill(paged: Paged, pages: Pages, rows: list[torch.Tensor]) -> None:
    """Store every sequence's rows where its table says, as earlier steps have."""
    for table, x_KGD in zip(paged.batch.table_SP.tolist(), rows, strict=True):
        slots = [table[index // pages.block] * pages.block + index % pages.block for index in range(len(x_KGD))]
        pages.write(x_KGD, torch.tensor(slots))


@pytest.mark.parametrize(("keys", "values"), [("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("int8", "int4"),
                                              ("full", "fp8"), ("int4", "full")])  # fmt: skip
@pytest.mark.parametrize("route", ["exact", "torch", "native"])
def test_attention_is_that_over_the_numbers_that_codes_mean(keys: str, values: str, route: str) -> None:
    if route == "native" and library().loaded is None:
        pytest.skip("needs gcc")
    for width, settings in zip((16, 24, 32), SETTINGS, strict=True):
        paged = make(PARTS, heads=6, groups=2, width=width)
        k, v = empty(paged, keys), empty(paged, values)
        fill(paged, k, paged.keys)
        fill(paged, v, paged.values)
        with torch_only() if route == "torch" else nullcontext():
            out = paged_attention(paged.q_THD, k, v, paged.batch, scale=0.25, exact=route == "exact", **settings)
        seen = replace(
            paged,
            keys=[round_trip(keys, x, SCALE_G) for x in paged.keys],
            values=[round_trip(values, x, SCALE_G) for x in paged.values],
        )
        assert (out - dense(seen, scale=0.25, **settings)).abs().max() < 2e-5


@pytest.mark.skipif(library().loaded is None, reason="needs gcc")
@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("width", [8, 24, 128])
def test_c_makes_the_codes_that_torch_makes(codec: str, width: int) -> None:
    paged = make([(40, 1)], heads=2, groups=2, width=width)
    x = torch.randn(40, 2, 3 * width, generator=torch.Generator().manual_seed(1))[..., width : 2 * width]
    x = x * torch.logspace(-7, 6, 40)[:, None, None]
    x[3, 1, 4], x[4], x[5, 0, 2] = torch.nan, 0, torch.inf
    x[6] = (x[6] * 8).round() / 8  # ties
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(2))[:40]
    mine, wanted = empty(paged, codec), empty(paged, codec)
    store_kv(x, x, mine, mine, slots)
    store_reference(x, x, wanted, wanted, slots)
    for a, b in zip(mine.tensors(), wanted.tensors(), strict=True):
        assert torch.equal(
            a.nan_to_num(-1) if a.is_floating_point() else a, b.nan_to_num(-1) if a.is_floating_point() else b
        )


@pytest.mark.parametrize("codec", list(CODECS))
def test_exact_rows_do_not_depend_on_the_batch(codec: str) -> None:
    paged = make([(100, 1), (31, 1), (260, 1)], heads=4, groups=2)
    k, v = empty(paged, codec), empty(paged, codec)
    fill(paged, k, paged.keys)
    fill(paged, v, paged.values)
    together = paged_attention(paged.q_THD, k, v, paged.batch, scale=0.25, exact=True)
    for s, (stored, new) in enumerate(paged.parts):
        table = [paged.batch.table_SP[s].tolist()]
        alone = type(paged.batch).build([stored], [new], [stored], table, block_size=16)
        assert torch.equal(paged_attention(paged.q_THD[s : s + 1], k, v, alone, scale=0.25, exact=True)[0], together[s])
