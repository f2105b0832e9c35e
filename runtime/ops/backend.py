"""Which implementation an operation runs: Triton for tensors on a GPU; on a CPU C where there is some, else torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from compress.core.compiling import triton_installed

_torch_only: ContextVar[bool] = ContextVar("torch_only", default=False)


def uses_triton(x: torch.Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel."""
    return x.is_cuda and triton_installed() and not _torch_only.get()


def uses_native(x: torch.Tensor) -> bool:
    """Whether an operation on `x` may run as compiled C, if it has any."""
    return x.device.type == "cpu" and not _torch_only.get()


@contextmanager
def torch_only() -> Iterator[None]:
    """Switch all kernels off inside the block: every operation runs its torch implementation."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)
