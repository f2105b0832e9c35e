"""Slots drawn by lot, the baseline that every method has to beat. The lot follows from the tokens, not the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "none"


def score(observed: Observed) -> Tensor:
    """Uniform numbers [G, S]."""
    import torch

    generator = torch.Generator().manual_seed(observed.seed)  # on the CPU: the same lot on any device
    return torch.rand(observed.k_GSD.shape[:2], generator=generator).to(observed.k_GSD.device)
