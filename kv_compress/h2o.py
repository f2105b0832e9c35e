"""What got most attention since it was stored stays: the heavy hitters.

Zhang et al., 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models,
arXiv:2306.14048. The shares of attention of all queries so far, those of the prompt and of generated tokens, added up
over the query heads that share a key. Each query has shares of one in all, of the slots that were left when it came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "all"


def score(observed: Observed) -> Tensor:
    """The attention that each slot got [G, S]."""
    if observed.attended_GS is None:
        raise ValueError("attention was not added up")
    return observed.attended_GS
