"""A choice of precisions tried on the text: what the model's perplexity becomes, and what a token takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kv_compress._kept import Kept, numbers, points_of, policy_of, token_bytes, uniform
from kv_compress._statistics import Layer, token_losses
from kv_compress.policy import FULL

if TYPE_CHECKING:
    from compress.core.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Tried:
    """`increase`: of perplexity, over the tokens whose queries find coded keys; NaN where there are none."""

    name: str
    bytes_per_token: int
    bits_per_number: float
    perplexity: float
    increase: float


class Trial:
    """Choices for one model on one text. `itemsize`: of a number in full; `context`: tokens of a sequence, of which
    bytes are counted where whole pages are coded."""

    def __init__(self, model: Any, tokens: Tokens, layers: Sequence[Layer], itemsize: int, context: int) -> None:
        self._model, self._tokens, self._layers = model, tokens, layers
        self._itemsize, self._context = itemsize, context
        self._plain = token_losses(model, tokens, None)

    def __call__(self, name: str, kept: Sequence[Kept]) -> Tried:
        """UsageError for pages that would hold no more tokens than in full."""
        points = points_of(kept, self._layers, self._itemsize)
        plain = kept == uniform(FULL, self._layers)
        found = self._plain
        if not plain:
            found = token_losses(self._model, self._tokens, policy_of(kept, self._layers), points)
        first = 0 if points is None else points.position(1)
        late = [(torch.cat([row[first:] for row in rows])).mean() for rows in (found, self._plain)]
        size = token_bytes(kept, self._layers, self._itemsize, self._context)
        return Tried(
            name,
            size,
            8 * size / numbers(self._layers),
            math.exp(torch.cat(found).mean()),
            math.expm1(late[0] - late[1]),
        )
