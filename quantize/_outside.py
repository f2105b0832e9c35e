"""Embedding and head: matrices outside the blocks, rounded to nearest when a recipe asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantize._rounding import round_rows

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.scheme import Scheme
    from compress.core.tensors import QuantTensor


def round_outside(checkpoint: Checkpoint, module: str, scheme: Scheme, clip: str) -> QuantTensor:
    """Nearest codes of a module's weight; only the rows that are worked on are read."""
    shape = checkpoint.matrix_shape(module)

    def read(rows: slice) -> torch.Tensor:
        wanted = torch.arange(rows.start, min(rows.stop, shape[0]))
        return checkpoint.rows(f"{module}.weight", wanted).float()

    return round_rows(read, shape, scheme, checkpoint.dtype, clip)[0]
