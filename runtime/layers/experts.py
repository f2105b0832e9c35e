"""A mixture of experts in place of the feed-forward.

Paper: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; softmax before top-k as in Mixtral,
https://arxiv.org/abs/2401.04088. Shape suffixes: T tokens, K hidden channels, E experts, A active experts of a token,
N = T · A visits (one token at one expert).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runtime.models.config import Experts


class MixtureOfExperts(nn.Module):
    """x [T, K] -> [T, K]. A token's sum goes over its experts in the order of their shares, whoever else is in the
    batch; each expert sees its tokens as one batch of rows."""

    def __init__(self, config: Experts, router: nn.Module, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.router = router
        self.experts = nn.ModuleList(experts)

    def forward(self, x_TK: Tensor) -> Tensor:
        share_TA, choice_TA = self._route(x_TK)
        order_N = choice_TA.flatten().argsort(stable=True)
        visits = torch.bincount(choice_TA.flatten(), minlength=len(self.experts)).tolist()
        x_NK = x_TK[order_N // self.config.active]
        y_NK = torch.empty_like(x_NK)
        start = 0
        for expert, count in zip(self.experts, visits, strict=True):
            if count:
                y_NK[start : start + count] = expert(x_NK[start : start + count])
                start += count
        return self._sum(y_NK, order_N, share_TA)

    def _route(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and numbers of each token's experts, largest share first."""
        share_TE = torch.softmax(self.router(x_TK).float(), dim=-1)
        share_TA, choice_TA = torch.topk(share_TE, self.config.active, dim=-1)
        if self.config.normalised:
            share_TA = share_TA / share_TA.sum(dim=-1, keepdim=True)
        return share_TA.to(x_TK.dtype), choice_TA

    def _sum(self, y_NK: Tensor, order_N: Tensor, share_TA: Tensor) -> Tensor:
        by_token_NK = torch.empty_like(y_NK)
        by_token_NK[order_N] = y_NK
        y_TAK = by_token_NK.view(*share_TA.shape, -1) * share_TA[:, :, None]
        out_TK = y_TAK[:, 0]
        for place in range(1, share_TA.shape[1]):
            out_TK = out_TK + y_TAK[:, place]
        return out_TK
