"""Root-mean-square norm through norm.c. Shape suffixes as in `runtime.ops.norm`."""

import torch

from compress.core.compiling import threads_for
from runtime.native.library import library


def takes(x_TD: torch.Tensor, weight_D: torch.Tensor) -> bool:
    """Whether the kernel does these CPU tensors and could be compiled."""
    return x_TD.dtype == weight_D.dtype == torch.float32 and library().loaded is not None


def normalise(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """`rms_norm`."""
    width = x_TD.shape[-1]
    if not x_TD.is_contiguous():
        x_TD = x_TD.contiguous()
    if not weight_D.is_contiguous():
        weight_D = weight_D.contiguous()
    out_TD = torch.empty_like(x_TD)
    floats = x_TD.numel()
    library().loaded.rms_norm(
        x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), floats // width, width, eps, float(plus_one),
        threads_for(floats),
    )  # fmt: skip
    return out_TD
