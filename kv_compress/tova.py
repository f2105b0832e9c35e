"""What the last query attends to stays, averaged over all heads.

Oren et al., 2024, Transformers are Multi-State RNNs (TOVA: token omission via attention), arXiv:2401.06104.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "last"


def score(observed: Observed) -> Tensor:
    """The last query's attention, the mean of all heads [G, S], the same for each."""
    attention_GRWS = observed.attention()
    return attention_GRWS[:, :, -1].mean(dim=(0, 1)).expand(attention_GRWS.shape[0], -1)
