"""What learned rounding aims at: a block's outputs near the original's, and behind the last block the original's words.

Shape suffixes: B samples, T positions, N tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compress.core.passes import Job

LOGITS_BYTES = 64 << 20


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
    """KL divergence of the next token's distribution from the original model's, through final norm and head."""

    def __init__(self, head: nn.Module, dtype: torch.dtype, vocabulary: int) -> None:
        self._head = head
        self._dtype = dtype
        self._rows_at_once = max(1, LOGITS_BYTES // (4 * vocabulary))

    def gradient(self, y_ND: Tensor, target_ND: Tensor) -> Tensor:
        gradients = []
        for part_ND, aim_ND in self._parts(y_ND, target_ND):
            leaf_ND = part_ND.detach().requires_grad_()
            with torch.enable_grad():
                logits_NV = self._logits(leaf_ND)
            logits_NV.backward(logits_NV.detach().softmax(-1) - self._wanted(aim_ND).exp_())
            gradients.append(leaf_ND.grad)
        return torch.cat(gradients)

    def error(self, y_ND: Tensor, target_ND: Tensor) -> float:
        total = 0.0
        for part_ND, aim_ND in self._parts(y_ND, target_ND):
            found_NV = self._logits(part_ND).log_softmax(-1)
            total += float(nn.functional.kl_div(found_NV, self._wanted(aim_ND), reduction="sum", log_target=True))
        return total

    def _parts(self, y_ND: Tensor, target_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(y_ND.split(self._rows_at_once), target_ND.split(self._rows_at_once), strict=True)

    @torch.no_grad()
    def _wanted(self, target_ND: Tensor) -> Tensor:
        """Logarithms of the original's distribution."""
        return self._logits(target_ND).log_softmax(-1)

    def _logits(self, y_ND: Tensor) -> Tensor:
        return self._head(inputs_embeds=y_ND[None].to(self._dtype), use_cache=False).logits[0].float()


def aim_behind(index: int, job: Job) -> Aim:
    """What the outputs of block `index` are for."""
    from compress.core.walk import compute_dtype

    if index < job.checkpoint.num_blocks - 1:
        return States()
    dtype = compute_dtype(job.checkpoint, job.dtype, job.device)
    return Words(job.checkpoint.build_head(dtype, job.device), dtype, job.checkpoint.config["vocab_size"])
