"""Attention over pages of single heads, in torch and in C; the interpreter does the same cases in Triton."""

from __future__ import annotations

import pytest
import torch

from kv_compress._coding import round_trip
from runtime.ops.attention import paged_attention
from runtime.ops.backend import torch_only
from runtime.ops.kv_store import store_kv
from tests.runtime.ops.kernel_cases import BY_HEAD, scattered
from tests.runtime.ops.paged import dense, make


@pytest.mark.parametrize("case", BY_HEAD, ids=str)
def test_pages_of_heads_lie_anywhere(case: tuple) -> None:
    keys, values, parts, (heads, width, block, columns), _, _, settings = case
    paged = make(parts, heads=heads, groups=1, width=width, block=block, seed=len(str(parts)))
    kind = {"scale": width**-0.5, "window": None, "softcap": None, **settings}
    found = []
    for exact, compiled in ((True, True), (False, True), (False, False)):
        k, v, there = scattered(paged, (keys, values), columns, store_kv, "cpu")
        if compiled:
            found.append(paged_attention(there.q_THD, k, v, there.batch, exact=exact, **kind))
        else:
            with torch_only():
                found.append(paged_attention(there.q_THD, k, v, there.batch, exact=exact, **kind))
    paged.keys = [round_trip(keys, x, torch.ones(1)) for x in paged.keys]
    paged.values = [round_trip(values, x, torch.ones(1)) for x in paged.values]
    for out in found:
        torch.testing.assert_close(out, dense(paged, **kind).float(), rtol=1e-5, atol=2e-6)
