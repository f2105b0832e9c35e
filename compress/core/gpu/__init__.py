"""Triton kernels of the solvers for GPUs: twins of those in `compress.core.native`, with the same arguments."""

from __future__ import annotations

from torch import Tensor

from compress.core.compiling import triton_installed


def serves(tensor: Tensor) -> bool:
    """Whether the kernels can run on what lies where this tensor does; imports no triton."""
    return tensor.is_cuda and triton_installed()
