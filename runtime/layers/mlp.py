"""The gated feed-forward: down(activation(gate(x)) · up(x)).

Paper: Shazeer 2020, https://arxiv.org/abs/2002.05202. Shape suffixes: T tokens, K hidden channels, F inner channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.layers.merged import Merged
from runtime.models.config import Activation

_FAST: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": torch.relu,
}


def activation_of(name: Activation, *, exact: bool) -> Callable[[Tensor], Tensor]:
    """The element-wise function of that name. With `exact`, one that gives an element the same bits wherever it lies:
    torch computes the last few elements of its own silu and tanh-gelu in another way than those before them."""
    return _EXACT.get(name, _FAST[name]) if exact else _FAST[name]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


_EXACT: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": _silu, "gelu_tanh": _gelu_tanh}


class MLP(nn.Module):
    """x [T, K] -> [T, K]."""

    def __init__(self, gate_up: Merged, down: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def forward(self, x_TK: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TK)
        return self.down(self.activation(gate_TF) * up_TF)
