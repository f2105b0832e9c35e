"""What completions go on with: sampled tokens, their log-probabilities, and whether they end there.

Shape legend: R rows, one per completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from runtime.logprobs import TokenLogprobs, token_logprobs
from runtime.sample import Sample
from runtime.sampler import sample


class Choice(NamedTuple):
    """The next token (None: the logits were unusable), and why the completion ends with it, if it does."""

    token: int | None
    reason: str | None


def choose(logits_RV: Tensor, samples: Sequence[Sample]) -> list[Choice]:
    """Sample a token for each row and hand it to its completion."""
    tokens = sample(logits_RV, [completion.picker for completion in samples])
    logprobs = _logprobs(logits_RV, samples, tokens)
    choices = []
    for row, (completion, token) in enumerate(zip(samples, tokens, strict=True)):
        reason = "error" if token is None else completion.take(token, logprobs.get(row))
        choices.append(Choice(token, reason))
    return choices


def _logprobs(logits_RV: Tensor, samples: Sequence[Sample], tokens: Sequence[int | None]) -> dict[int, TokenLogprobs]:
    """Of the rows that asked for them."""
    tops = {row: completion.params.logprobs for row, completion in enumerate(samples)}
    asked = {row: top for row, top in tops.items() if top is not None and tokens[row] is not None}
    if not asked:
        return {}
    chosen = [token for row, token in enumerate(tokens) if row in asked and token is not None]
    found = token_logprobs(logits_RV[list(asked)], chosen, max(asked.values()))
    return {row: entry.with_top(top) for (row, top), entry in zip(asked.items(), found, strict=True)}
