"""Several linear layers that read the same input: as one product where their weights could be joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Merged(nn.Module):
    """x [T, K] -> one output [T, width] per width. `linears` is a single layer of all widths, or one for each."""

    def __init__(self, linears: Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.widths = list(widths)

    def forward(self, x_TK: Tensor) -> tuple[Tensor, ...]:
        if len(self.linears) == 1:
            return torch.split(self.linears[0](x_TK), self.widths, dim=-1)
        return tuple(linear(x_TK) for linear in self.linears)
