"""How many weights of a model's linear layers are zero, and whether they lie in 2:4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
            other_RK = checkpoint.tensor(f"{name}.weight") != 0
            zeros += other_RK.numel() - int(other_RK.sum())
            weights += other_RK.numel()
            layers += 1
            in_fours = other_RK.shape[1] % 4 == 0
            held += in_fours and bool((other_RK.view(-1, 4).sum(1) <= 2).all())
    return Zeros(zeros / max(weights, 1), layers, held)
