"""What eviction methods are given, and how their scores decide what stays.

Shape suffixes: G key-value heads, H query heads, R query heads of a key-value head (H / G), S slots, D channels of a
head, W observed queries, F rotary frequencies, N slots that are kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """One layer of one sequence at a point. Slots are in order of age, the oldest first; the last W are those of the
    observed queries. All numbers are fp32.

    k_GSD (rotated), v_GSD, q_HWD (rotated, may be empty). `scale` and `softcap` of the layer's attention. `position`:
    logical, of the next token. frequency_F: the angle per position of each rotated pair of channels (halves against
    each other). `protected`: the first and the last slots, which stay whatever their score. `seed`: follows from the
    tokens and the layer. attended_GS: the attention that each slot got so far, where the method adds that up.
    """

    k_GSD: Tensor
    v_GSD: Tensor
    q_HWD: Tensor
    scale: float
    softcap: float | None
    position: int
    frequency_F: Tensor
    protected: tuple[int, int]
    seed: int = 0
    attended_GS: Tensor | None = None

    def attention(self) -> Tensor:
        """Probabilities [G, R, W, S] of the observed queries over the slots that each of them sees."""
        groups, slots, _ = self.k_GSD.shape
        heads, queries, width = self.q_HWD.shape
        q_GMD = self.q_HWD.reshape(groups, heads // groups * queries, width)
        score = (q_GMD @ self.k_GSD.transpose(1, 2)).view(groups, -1, queries, slots) * self.scale
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        later_WS = torch.ones(queries, slots, dtype=torch.bool, device=score.device).triu(slots - queries + 1)
        return score.masked_fill(later_WS, float("-inf")).softmax(-1)


def scorer(method: str) -> Callable[[Observed], Tensor]:
    """The function `score` of a method's file: scores [G, S], the higher the rather a slot stays."""
    return importlib.import_module(f"kv_compress.{method}").score


def keep(scores_GS: Tensor, count: int, protected: tuple[int, int]) -> Tensor:
    """The slots [G, N] that stay, rising: the first and last that are protected, and those of the highest scores. Of
    equal scores the older slot stays, so that the choice is the same anywhere."""
    first, last = protected
    slots = scores_GS.shape[1]
    ranked_GS = scores_GS.clone()
    ranked_GS[:, :first] = float("inf")
    ranked_GS[:, max(slots - last, 0) :] = float("inf")
    best_GS = ranked_GS.sort(dim=1, descending=True, stable=True).indices
    return best_GS[:, :count].sort(dim=1).values
