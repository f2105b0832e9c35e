"""Log-probabilities as the model gives them: before penalties, temperature and filters.

Shape legend: R rows (one per token asked about), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """One token: its natural-log probability, its rank (1 is the likeliest), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()

    def with_top(self, count: int) -> TokenLogprobs:
        """The same with no more than `count` of the likeliest tokens."""
        return self if len(self.top) <= count else replace(self, top=self.top[:count])


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Row i says how likely `tokens[i]` was, with the `top` likeliest tokens of the row beside it."""
    logits_RV = logits_RV.float()
    token_R1 = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)[:, None]
    total_R1 = logits_RV.logsumexp(-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, token_R1)
    ranks = ((logits_RV > chosen_R1).sum(-1) + 1).tolist()
    logprobs = (chosen_R1 - total_R1)[:, 0].tolist()
    if not top:
        return [TokenLogprobs(*row) for row in zip(tokens, logprobs, ranks, strict=True)]
    best = logits_RV.topk(min(top, logits_RV.shape[1]), dim=-1)
    ids, values = best.indices.tolist(), (best.values - total_R1).tolist()
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, rank, row_ids, row_values in zip(tokens, logprobs, ranks, ids, values, strict=True)
    ]
