"""Token ids -> rows of the embedding, which stays in its stored dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Embedding(nn.Module):
    """ids [T] -> x [T, D] in the compute dtype, times `scale` (rounded to that dtype first, as Gemma was trained)."""

    weight_VD: Tensor

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight_VD", weight_VD, persistent=False)
        self.dtype = dtype
        self.scale = float(torch.tensor(scale, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        x_TD = nn.functional.embedding(ids_T, self.weight_VD).to(self.dtype)
        return x_TD if self.scale == 1.0 else x_TD * self.scale
