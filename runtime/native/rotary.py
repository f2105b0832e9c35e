"""Rotary position embedding through rotary.c. Shape suffixes as in `runtime.ops.rotary`."""

import torch

from compress.core.compiling import threads_for
from runtime.native.library import library


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernel does these CPU tensors and could be compiled."""
    return all(x.dtype == torch.float32 for x in tensors) and library().loaded is not None


def rotate_both(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary`."""
    tokens, heads, width = q_THD.shape
    groups = k_TGD.shape[1]
    q_THD, k_TGD = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q_THD, k_TGD))
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    q_out = torch.empty((tokens, heads, width), dtype=torch.float32)
    k_out = torch.empty((tokens, groups, width), dtype=torch.float32)
    library().loaded.rotary(
        q_THD.data_ptr(), k_TGD.data_ptr(), cos_TR.data_ptr(), sin_TR.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
        tokens, heads, groups, width, cos_TR.shape[1], q_THD.stride(0), k_TGD.stride(0),
        threads_for(q_out.numel() + k_out.numel()),
    )  # fmt: skip
    return q_out, k_out
