"""2:4 weights on a GPU with sparse tensor cores: two of every four numbers and where they were, through torch.

Mishra et al., 2021, Accelerating Sparse Deep Neural Networks, https://arxiv.org/abs/2104.08378. torch takes cuSPARSELt,
or CUTLASS where it is told to, and pads a few rows to eight.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional

from runtime.layers.base import LinearLayer

LEAST_CAPABILITY = (8, 0)


def has_sparse_cores(device: str | torch.device) -> bool:
    """Whether a device multiplies 2:4 weights by itself."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


class SemiStructuredLinear(LinearLayer):
    """A 2:4 weight in 16 bits. RuntimeError, torch's own, for a shape or a build of torch that cannot do it."""

    packed: Tensor
    meta: Tensor | None

    def __init__(self, weight_OK: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight_OK.shape[0], weight_OK.shape[1]), bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is a prototype: results are compared before use
            self.weight = torch.sparse.to_sparse_semi_structured(weight_OK.contiguous())
        self.register_buffer("packed", self.weight.packed)  # what takes memory; `weight` is a view of it
        self.register_buffer("meta", self.weight.meta)

    def product(self, x_MK: Tensor) -> Tensor:
        return functional.linear(x_MK.to(self.packed.dtype), self.weight)
