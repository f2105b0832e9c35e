"""Lower layers keep more than higher ones, which attend to few tokens.

Cai et al., 2024, PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv:2406.02069.
Scores are SnapKV's; budgets fall linearly from the first layer to the last (kv_compress._budget.falling).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "recent"


def score(observed: Observed) -> Tensor:
    """SnapKV's."""
    from kv_compress import snapkv

    return snapkv.score(observed)
