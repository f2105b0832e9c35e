"""Heads of a layer share its budget: one that attends to much keeps more than one that looks at few tokens.

Feng et al., 2024, Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv:2407.11550. Scores are
SnapKV's. The highest of all heads' scores stay, and of each head a share of the budget in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "recent"


def score(observed: Observed) -> Tensor:
    """SnapKV's."""
    from kv_compress import snapkv

    return snapkv.score(observed)


def keep_among(
    scores: Sequence[Tensor], count: int, protected: tuple[int, int], alpha_safeguard: float
) -> list[Tensor]:
    """The slots of each head that stay, rising, `count` times the number of heads in all: first those that are
    protected and of each head the best `alpha_safeguard * count`, then the best of all heads. `scores`: of each head,
    which may have different numbers of slots. Of equal scores that of the earlier head and older slot stays."""
    import torch

    first, last = protected
    ranked = []
    for score_S in scores:
        rank_S, slots = score_S.clone(), len(score_S)
        rank_S[:first] = float("inf")
        rank_S[max(slots - last, 0) :] = float("inf")
        safe = max(int(count * alpha_safeguard), alpha_safeguard > 0)
        rank_S[rank_S.sort(descending=True, stable=True).indices[:safe]] = float("inf")
        ranked.append(rank_S)
    rank_all = torch.cat(ranked)
    stays = torch.zeros(len(rank_all), dtype=torch.bool, device=rank_all.device)
    stays[rank_all.sort(descending=True, stable=True).indices[: count * len(scores)]] = True
    return [part.nonzero()[:, 0] for part in stays.split([len(score_S) for score_S in scores])]
