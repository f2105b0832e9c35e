"""QuaRot's rotation (Ashkboos et al., 2024, arXiv:2404.00456), fused into the weights: no channel stands out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantize.prepare._transform import Transform

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint


class Rotate(Transform):
    """Turn the residual stream by a randomized Hadamard matrix: norms fold into the layers behind them, all layers that
    read or write the stream turn with it, embedding and head too. Nothing is rotated while the model runs."""

    paper: ClassVar = "Ashkboos et al., 2024, arXiv:2404.00456"
    reads: ClassVar = True
    mixes: ClassVar = True

    seed: int = Field(0, ge=0, description="signs of the randomized Hadamard matrices")
    heads: bool = Field(True, description="also turn the values of each head, and the output projection back")

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        from quantize.prepare._rotate import RotatedCheckpoint

        if isinstance(checkpoint, RotatedCheckpoint):
            return checkpoint
        return RotatedCheckpoint(checkpoint, self.seed, heads=self.heads)
