"""What the methods share when they work: a mask put on a layer, and what it costs there.

Shape suffixes: R rows (output channels), K input channels.
"""

from __future__ import annotations

from torch import Tensor

from compress.core.walk import Site

TINY = 1e-30  # instead of a power of zero


def put(site: Site, weight_RK: Tensor, *, method: str, error: float, tokens: int, fallback: str = "") -> None:
    """Let `weight_RK`, fp32 with zeros, be the site's weight. A note says how many zeros there are."""
    site.replace(weight_RK)
    zeros = 1 - float(weight_RK.count_nonzero()) / weight_RK.numel()
    site.note(method=method, error=error, sparsity=round(zeros, 6), tokens=tokens, fallback=fallback)


def relative_loss(score_RK: Tensor, kept_RK: Tensor) -> float:
    """The share of the squared outputs that goes with what is not kept, as far as input channels are independent of
    each other. `score_RK` is each weight's part of the outputs, or its size where nothing is known of inputs."""
    power_RK = score_RK.square()
    return float(power_RK.masked_fill(kept_RK, 0).sum()) / max(float(power_RK.sum()), TINY)


def weighted(rows_RK: Tensor, hessian_KK: Tensor) -> float:
    """tr(A H Aᵀ)."""
    return float(((rows_RK @ hessian_KK) * rows_RK).sum())
