"""Which dtype the runtime computes in, which is also the one that it holds full keys and values in. Needs torch alone.

Plans and reports count bytes in it, so that what they say of a machine is what is allocated there.
"""

from __future__ import annotations

from typing import Literal

import torch

from compress.core.cpu import fast_on_cpu
from compress.core.errors import UsageError

Numerics = Literal["exact", "fast"]


def runtime_dtype(
    numerics: str = "fast", device: str | torch.device = "auto", asked: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of activations, and of keys and values in full: what is `asked` for, or fp32 in exact numerics and
    where bf16 products are slow, else bf16. `device` auto: a GPU where there is one. UsageError for exact numerics in
    any other dtype than fp32."""
    if numerics == "exact":
        if asked not in (None, torch.float32):
            raise UsageError(f"exact numerics compute in float32, not in {dtype_name(asked)}")
        return torch.float32
    if asked is not None:
        return asked
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = torch.device(device).type == "cpu"
    return torch.bfloat16 if not on_cpu or fast_on_cpu(torch.bfloat16) else torch.float32


def dtype_name(dtype: torch.dtype | None) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")
