"""What this CPU is good at. Needs torch alone."""

from __future__ import annotations

import torch


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """bf16 products are 5 times as fast as fp32 where the CPU has instructions for them, 8 times slower elsewhere."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype is torch.float32 or (dtype is torch.bfloat16 and has_bf16)
