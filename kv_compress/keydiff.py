"""Keys unlike the others stay: the most similar ones tell the same twice.

Park et al., 2025, KeyDiff: Key Similarity-Based KV Cache Eviction, arXiv:2504.15364.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "none"


def score(observed: Observed) -> Tensor:
    """Minus the cosine between each key and the mean direction of all keys of its head [G, S]."""
    from torch.nn.functional import cosine_similarity, normalize

    mean_G1D = normalize(observed.k_GSD, dim=-1).mean(dim=1, keepdim=True)
    return -cosine_similarity(observed.k_GSD, mean_G1D, dim=-1)
