"""Rotary position embedding in Triton, queries and keys in one launch. Shape suffixes as in `runtime.ops.rotary`."""

import torch
import triton
import triton.language as tl


def rotate_both(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary`."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_TGD))
    cos, sin = cos_TR.contiguous(), sin_TR.contiguous()
    tokens, heads, width = q.shape
    groups = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _rotate[(tokens, heads + groups)](
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        HEADS=heads,
        GROUPS=groups,
        WIDTH=width,
        ROTATED=cos.shape[-1],
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )
    return q_out, k_out


@triton.jit
def _rotate(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_g,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, n): head n of the queries, then of the keys."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    turns = d < ROTATED
    cos = tl.load(cos_ptr + token * ROTATED + d, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * ROTATED + d, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(d < ROTATED // 2, -sin, sin)
    partner = tl.where(d < ROTATED // 2, d + ROTATED // 2, d - ROTATED // 2)
    if head < HEADS:
        _rotate_head(q_ptr + token * q_stride_t + head * q_stride_h, d, partner, turns, cos, sin, WIDTH,
                     q_out_ptr + (token * HEADS + head) * WIDTH)  # fmt: skip
    else:
        group = head - HEADS
        _rotate_head(k_ptr + token * k_stride_t + group * k_stride_g, d, partner, turns, cos, sin, WIDTH,
                     k_out_ptr + (token * GROUPS + group) * WIDTH)  # fmt: skip


@triton.jit
def _rotate_head(x_ptr, d, partner, turns, cos, sin, WIDTH: tl.constexpr, out_ptr):
    x = tl.load(x_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=turns, other=0.0).to(tl.float32)
    tl.store(out_ptr + d, (x * cos + other * sin).to(out_ptr.dtype.element_ty), mask=d < WIDTH)
