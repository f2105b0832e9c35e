"""What the last queries of the prompt attend to stays, with its neighbours.

Li et al., 2024, SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469. The mean over queries,
pooled over neighbouring slots, then the mean over the query heads that share a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "recent"
_NEIGHBOURS = 5  # slots that are pooled


def score(observed: Observed) -> Tensor:
    """Pooled attention of the observed queries to the slots before them [G, S]; their own slots are protected."""
    from torch.nn.functional import avg_pool1d, pad

    queries = observed.q_HWD.shape[1]
    attention_GRS = observed.attention()[..., :-queries].mean(dim=2)
    pooled_GRS = avg_pool1d(attention_GRS, _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)
    return pad(pooled_GRS.mean(dim=1), (0, queries))
