"""How many weights of a model's linear layers are zero, and whether they lie in 2:4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Zeros:
    """Of the linear layers of the blocks: the share of zeros, how many layers there are, and how many of them have at
    most two weights other than zero in all four neighbours along the input channels."""

    share: float
    layers: int
    two_of_four: int


def count_zeros(checkpoint: Checkpoint) -> Zeros:
    """Read every layer of a dense model, one at a time."""
    zeros = weights = layers = held = 0
    for index in range(checkpoint.num_blocks):
        for name in checkpoint.sites(index):
            weight_RK = checkpoint.tensor(f"{name}.weight")
            zeros += weight_RK.numel() - int((weight_RK != 0).sum())
            weights += weight_RK.numel()
            layers += 1
            held += in_two_of_four(weight_RK)
    return Zeros(zeros / max(weights, 1), layers, held)


def share_of_zeros(weight_RK: Tensor) -> float:
    """Of all numbers of a weight."""
    return 1 - int((weight_RK != 0).sum()) / max(weight_RK.numel(), 1)


def in_two_of_four(weight_RK: Tensor) -> bool:
    """Whether at most two of any four neighbours along the input channels are other than zero. Exact."""
    return weight_RK.shape[1] % 4 == 0 and bool(((weight_RK != 0).view(-1, 4).sum(1) <= 2).all())
