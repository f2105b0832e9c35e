"""Root-mean-square norms over the last axis.

Paper: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Gemma's weights are kept as w - 1 (`plus_one`).
"""

from __future__ import annotations

from torch import Tensor, nn

from runtime.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """x [..., D] -> x / rms(x) · weight, each row on its own."""

    weight_D: Tensor

    def __init__(self, weight_D: Tensor, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight_D", weight_D, persistent=False)
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight_D, self.eps, plus_one=self.plus_one)
