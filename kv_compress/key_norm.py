"""Keys of small norm stay: they are the ones that attract attention.

Devoto et al., 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv:2406.11430.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "none"


def score(observed: Observed) -> Tensor:
    """Minus the norm of each key [G, S]."""
    return -observed.k_GSD.norm(dim=-1)
