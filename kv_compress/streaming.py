"""Attention sinks and a recent window: the first tokens stay and, of the rest, the latest.

Xiao et al., 2023, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453. Positions stay what they
were: keys are not rotated anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "none"


def score(observed: Observed) -> Tensor:
    """The later, the higher [G, S]; the sinks are protected."""
    import torch

    groups, slots, _ = observed.k_GSD.shape
    return torch.arange(slots, dtype=torch.float32, device=observed.k_GSD.device).expand(groups, -1)
