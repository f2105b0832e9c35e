"""Attention seen from inside a transformers model, through functions registered for attention and for its mask.

Registering the first without the second would make the model quietly non-causal: transformers builds no mask for an
implementation that it has no mask function of. Ours is eager's.

Shape suffixes: B rows, H query heads, G key-value heads, R = H / G, T tokens that ask, S tokens asked about, D channels
of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "compress_observed"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer attends with: queries and keys after norms and rotation, and the mask to add to their scores."""

    layer: int
    q_BHTD: Tensor
    k_BGSD: Tensor
    v_BGSD: Tensor
    mask_BTS: Tensor | None
    scale: float
    softcap: float | None = None

    def weights(self, k_BGSD: Tensor | None = None) -> Tensor:
        """Attention weights [B, G, R, T, S], fp32, with these keys instead of its own."""
        return self._shares(self._scores(self.k_BGSD if k_BGSD is None else k_BGSD))

    def attend(self, weights_BGRTS: Tensor, v_BGSD: Tensor | None = None) -> Tensor:
        """What attention gives [B, H, T, D], fp32, with these values instead of its own."""
        values = self.v_BGSD if v_BGSD is None else v_BGSD
        return torch.einsum("bgrts,bgsd->bgrtd", weights_BGRTS, values.float()).flatten(1, 2)

    def attend_mixed(self, k_BGSD: Tensor, v_BGSD: Tensor, others_TS: Tensor) -> Tensor:
        """What attention gives where a token finds some tokens (`others_TS`) with these keys and values, the others
        with their own."""
        weights = self._shares(torch.where(others_TS, self._scores(k_BGSD), self._scores(self.k_BGSD)))
        return self.attend(weights * others_TS, v_BGSD) + self.attend(weights * ~others_TS)

    def _scores(self, k_BGSD: Tensor) -> Tensor:
        q_BGRTD = self.q_BHTD.unflatten(1, (k_BGSD.shape[1], -1)).float()
        scores = torch.einsum("bgrtd,bgsd->bgrts", q_BGRTD, k_BGSD.float()) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def _shares(self, scores_BGRTS: Tensor) -> Tensor:
        if self.mask_BTS is not None:
            scores_BGRTS = scores_BGRTS + self.mask_BTS[:, None, None].float()
        return scores_BGRTS.softmax(-1)


Observe = Callable[[Seen], Tensor | None]


@contextmanager
def observed(model: Any, observe: Observe) -> Iterator[None]:
    """`observe` is shown the attention of every layer that runs inside. What it gives back ([B, H, T, D]) is what the
    layer goes on with; None stands for the plain result. The model is as it was afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
    ) -> tuple[Tensor, None]:
        scale, softcap = told.get("scaling"), told.get("softcap")
        mask = None if attention_mask is None else attention_mask[:, 0, :, : key.shape[2]]
        seen = Seen(
            module.layer_idx, query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale, softcap
        )
        result = observe(seen)
        y_BHTD = seen.attend(seen.weights()) if result is None else result
        return y_BHTD.to(query.dtype).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
