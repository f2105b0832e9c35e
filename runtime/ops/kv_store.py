"""Writing keys and values into the pool. Keys come after rotary.

Shape suffixes: T tokens, P pages, B slots of a page, G key-value heads, D head width.
"""

import torch

from runtime.native import kv_store as native
from runtime.ops.backend import uses_native, uses_triton
from runtime.ops.pages import Pages, as_pages


def store_kv(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k: torch.Tensor | Pages, v: torch.Tensor | Pages, slot_T: torch.Tensor
) -> None:
    """Put each token's keys and values at slot_T (int64, page * B + offset) of the pools, coded as these say, else in
    the pools' dtype.

    Several tokens may name the same slot only if nobody reads it (padding): which one stays is not defined.
    """
    if uses_triton(k_TGD) and as_pages(k).coded is None:
        from runtime.ops.triton.kv_store import store

        store(k_TGD, v_TGD, k, v, slot_T)
        return
    for x_TGD, pages in ((k_TGD, as_pages(k)), (v_TGD, as_pages(v))):
        if uses_native(x_TGD) and native.takes(x_TGD, pages):
            native.store(x_TGD, pages, slot_T)
        else:
            pages.write(x_TGD, slot_T)


def store_reference(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k: torch.Tensor | Pages, v: torch.Tensor | Pages, slot_T: torch.Tensor
) -> None:
    """`store_kv` in torch."""
    as_pages(k).write(k_TGD, slot_T)
    as_pages(v).write(v_TGD, slot_T)
