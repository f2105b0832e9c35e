"""Padding of decode batches for CUDA graphs: what can be held without a GPU."""

from __future__ import annotations

import pytest
import torch

from runtime.graphs import PaddedDecodes
from runtime.ops.attention import paged_attention
from runtime.ops.kv_store import store_kv
from tests.runtime.ops.paged import make


@pytest.mark.parametrize("parts", [[(20, 1)], [(3, 1), (40, 1), (17, 1)], [(5, 1)] * 8])
def test_padding_changes_no_row_and_writes_only_to_the_trash_page(parts: list[tuple[int, int]]) -> None:
    paged = make(parts, heads=4, groups=2, width=16)
    rows, size = len(parts), 8
    free = set(range(len(paged.k_PBGD))) - set(paged.batch.table_SP.unique().tolist())
    trash = min(free)
    padded = PaddedDecodes.empty(size, pages=6, trash_page=trash, block_size=16, device=torch.device("cpu"))
    padded.fill(torch.arange(rows), paged.batch)
    assert padded.ids_N.tolist() == [*range(rows)] + [0] * (size - rows)

    before = paged.k_PBGD.clone()
    k_NGD = torch.zeros(size, 2, 16)
    for row, slot in enumerate(paged.batch.slot_T.tolist()):
        k_NGD[row] = before.view(-1, 2, 16)[slot]  # what is there already
    store_kv(k_NGD, k_NGD, paged.k_PBGD, paged.v_PBGD.clone(), padded.batch.slot_T)
    changed = (paged.k_PBGD != before) & ~(paged.k_PBGD.isnan() & before.isnan())
    assert set(changed.flatten(1).any(1).nonzero().flatten().tolist()) <= {trash}

    paged.k_PBGD[trash] = paged.v_PBGD[trash] = 0
    q_NHD = torch.zeros(size, 4, 16)
    q_NHD[:rows] = paged.q_THD
    padded.batch.kv_len = padded.batch.kv_len_S.tolist()  # the CPU's routes read lengths on the host, graphs do not
    padded.batch.indices = padded.batch.index_T.tolist()
    out = paged_attention(q_NHD, paged.k_PBGD, paged.v_PBGD, padded.batch, scale=0.25)
    wanted = paged_attention(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=0.25)
    assert torch.allclose(out[:rows], wanted, atol=1e-6)
    assert out.isfinite().all()


def test_a_filled_batch_forgets_the_one_before() -> None:
    padded = PaddedDecodes.empty(4, pages=3, trash_page=9, block_size=16, device=torch.device("cpu"))
    padded.fill(torch.arange(3), make([(20, 1), (40, 1), (2, 1)]).batch)
    last = make([(7, 1)])
    padded.fill(torch.tensor([5]), last.batch)
    assert padded.ids_N.tolist() == [5, 0, 0, 0]
    assert padded.batch.kv_len_S.tolist() == [8, 1, 1, 1]
    assert padded.batch.position_T.tolist() == [7, 0, 0, 0]
    assert padded.batch.slot_T.tolist() == [last.batch.slot_T.item(), 144, 144, 144]
    assert padded.batch.table_SP[1:].eq(9).all()
