"""What learned rounding aims at: a block's outputs near the original's, and behind the last block the original's words.

Shape suffixes: B samples, T positions, N tokens, D hidden width, V vocabulary; B is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compress.core.passes import Job

LOGITS_BYTES = 32 << 20  # of one part's logits in fp32
_CACHED_BYTES = 2 << 20


class Aim(Protocol):
    """An error of outputs y_ND, fp32, against target_ND. Tokens are rows."""

    def gradient(self, y_ND: Tensor, target_ND: Tensor) -> Tensor: ...
    def error(self, y_ND: Tensor, target_ND: Tensor) -> float: ...


class States:
    """Each token's squared error relative to its own mean square. Whatever reads them normalises every token, and a
    few tokens are larger than all others by far."""

    def gradient(self, y_ND: Tensor, target_ND: Tensor) -> Tensor:
        return (y_ND - target_ND) / self._power(target_ND)

    def error(self, y_ND: Tensor, target_ND: Tensor) -> float:
        return float(((y_ND - target_ND).square_() / self._power(target_ND)).sum())

    def _power(self, target_ND: Tensor) -> Tensor:
        return target_ND.square().mean(-1, keepdim=True).clamp_(min=1e-12)


class Words:
    """KL divergence of the next token's distribution from the original model's, through final norm and head.

    Two matrices of logits of at most LOGITS_BYTES each are all that is held: what is made of them in fp32 goes row by
    row, in cache.
    """

    def __init__(self, head: nn.Module, dtype: torch.dtype, vocabulary: int) -> None:
        self._head = head
        self._dtype = dtype
        self._rows_at_once = max(1, LOGITS_BYTES // (4 * vocabulary))
        self._rows_in_cache = max(1, _CACHED_BYTES // (4 * vocabulary))

    def gradient(self, y_ND: Tensor, target_ND: Tensor) -> Tensor:
        gradient_ND = torch.empty_like(y_ND)
        for rows in self._parts(y_ND):
            leaf_ND = y_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits_BNV = self._logits(leaf_ND)
            with torch.no_grad():
                slope_BNV = self._logits(target_ND[rows])
            for found_NV, slope_NV in self._cached(logits_BNV, slope_BNV):
                slope_NV.copy_(found_NV.float().softmax(-1).sub_(slope_NV.float().softmax(-1)))
            logits_BNV.backward(slope_BNV)
            gradient_ND[rows] = leaf_ND.grad
        return gradient_ND

    def error(self, y_ND: Tensor, target_ND: Tensor) -> float:
        total = 0.0
        for rows in self._parts(y_ND):
            for found_NV, wanted_NV in self._cached(self._logits(y_ND[rows]), self._logits(target_ND[rows])):
                found_NV, wanted_NV = found_NV.float().log_softmax(-1), wanted_NV.float().log_softmax(-1)
                total += float(nn.functional.kl_div(found_NV, wanted_NV, reduction="sum", log_target=True))
        return total

    def _parts(self, y_ND: Tensor) -> Iterator[slice]:
        return (slice(start, start + self._rows_at_once) for start in range(0, len(y_ND), self._rows_at_once))

    def _cached(self, found_BNV: Tensor, wanted_BNV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        found_NV, wanted_NV = found_BNV.detach()[0], wanted_BNV[0]
        return zip(found_NV.split(self._rows_in_cache), wanted_NV.split(self._rows_in_cache), strict=True)

    def _logits(self, y_ND: Tensor) -> Tensor:
        return self._head(inputs_embeds=y_ND[None].to(self._dtype), use_cache=False).logits


def aim_behind(index: int, job: Job) -> Aim:
    """What the outputs of block `index` are for."""
    from compress.core.walk import compute_dtype

    if index < job.checkpoint.num_blocks - 1:
        return States()
    dtype = compute_dtype(job.checkpoint, job.dtype, job.device)
    return Words(job.checkpoint.build_head(dtype, job.device), dtype, job.checkpoint.config["vocab_size"])
