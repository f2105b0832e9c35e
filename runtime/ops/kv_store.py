"""Writing keys and values into the pool. Keys come after rotary.

Shape suffixes: T tokens, P pages, B slots of a page, G key-value heads, D head width.
"""

import torch

from runtime.ops.backend import uses_triton


def store_kv(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_PBGD: torch.Tensor, v_PBGD: torch.Tensor, slot_T: torch.Tensor
) -> None:
    """Put each token's keys and values at slot_T (int64, page * B + offset) of the pools, in the pools' dtype.

    Several tokens may name the same slot only if nobody reads it (padding): which one stays is not defined.
    """
    if uses_triton(k_TGD):
        from runtime.ops.triton.kv_store import store
    else:
        store = store_reference
    store(k_TGD, v_TGD, k_PBGD, v_PBGD, slot_T)


def store_reference(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_PBGD: torch.Tensor, v_PBGD: torch.Tensor, slot_T: torch.Tensor
) -> None:
    """`store_kv` in torch."""
    k_PBGD.flatten(0, 1).index_copy_(0, slot_T, k_TGD.to(k_PBGD.dtype))
    v_PBGD.flatten(0, 1).index_copy_(0, slot_T, v_TGD.to(v_PBGD.dtype))
