"""Writing keys and values into the pool, in Triton. Shape suffixes as in `runtime.ops.kv_store`."""

import torch
import triton
import triton.language as tl


def store(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_PBGD: torch.Tensor, v_PBGD: torch.Tensor, slot_T: torch.Tensor
) -> None:
    """`store_kv`."""
    k, v = k_TGD.flatten(1), v_TGD.flatten(1)  # a view, unless heads lie apart
    tokens, width = k.shape
    block = min(triton.next_power_of_2(width), 1024)
    _store[(tokens, triton.cdiv(width, block))](
        k, v, k_PBGD, v_PBGD, slot_T, k.stride(0), v.stride(0), WIDTH=width, BLOCK=block, num_warps=4
    )


@triton.jit
def _store(
    k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, slot_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (t, part): one token's part of BLOCK channels. The pool's slots lie WIDTH apart."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < WIDTH
    place = tl.load(slot_ptr + token).to(tl.int64) * WIDTH + channel
    k = tl.load(k_ptr + token * k_stride + channel, mask=real)
    v = tl.load(v_ptr + token * v_stride + channel, mask=real)
    tl.store(k_pool_ptr + place, k.to(k_pool_ptr.dtype.element_ty), mask=real)
    tl.store(v_pool_ptr + place, v.to(v_pool_ptr.dtype.element_ty), mask=real)
