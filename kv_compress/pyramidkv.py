"""Lower layers keep more than higher ones, which attend to few tokens.

Cai et al., 2024, PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv:2406.02069.
Scores are SnapKV's; budgets fall linearly from the first layer to the last. Here they are whole numbers whose sum is
that of equal budgets, so that what is stored in all is known beforehand.
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


def budgets(kept: int, least: int, stored: Sequence[int], beta: float) -> tuple[int, ...]:
    """Slots that stay in each head of each layer, `kept` in the mean, if `stored` are there. What always stays
    (`least`) is in all of them; of the rest the last layer gets 1 / beta of the mean, unless the first would get more
    than it has."""
    count, rest = len(stored), kept - least
    highest = min(rest * (2 - 1 / beta), max(stored) - least)
    fall = 2 * (highest - rest) / max(count - 1, 1)
    wanted = [least + highest - fall * layer for layer in range(count)] if count > 1 else [float(kept)]
    found = [min(int(share), has) for share, has in zip(wanted, stored, strict=True)]
    in_line = sorted(range(count), key=lambda layer: int(wanted[layer]) - wanted[layer])
    left = kept * count - sum(found)
    while left > 0:  # what was rounded off, or is not there in a layer, goes to others
        open_ = [layer for layer in in_line if found[layer] < stored[layer]]
        for layer in open_[: max(left, 1)]:
            more = min(max(left // len(open_), 1), stored[layer] - found[layer], left)
            found[layer] += more
            left -= more
    return tuple(found)
