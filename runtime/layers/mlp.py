"""The gated feed-forward: down(activation(gate(x)) · up(x)).

Paper: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.layers.merged import Merged
from runtime.models.config import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": torch.relu,
}


class MLP(nn.Module):
    """x [T, K] -> [T, K]."""

    def __init__(self, gate_up: Merged, down: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TK: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TK)
        return self.down(self.activation(gate_TF) * up_TF)
