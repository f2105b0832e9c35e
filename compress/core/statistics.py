"""What a pass can ask the walk to measure on the inputs of a group: update(x) per micro-batch, result() at the end.

Shapes: N tokens, K input channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

TILE = 256  # of the sizes tried the fastest, at widths from 576 to 8192


class Statistic(ABC):
    """A running figure over a group's inputs. Sums run in a fixed order, so the same batches give the same bits."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        self.width = width
        self.device = device
        self.tokens = 0

    def update(self, x_NK: Tensor) -> None:
        """Add the rows of `x_NK` (any float dtype)."""
        if x_NK.shape[0]:
            self.tokens += x_NK.shape[0]
            self._add(x_NK)

    @abstractmethod
    def _add(self, x_NK: Tensor) -> None: ...

    @abstractmethod
    def result(self) -> Tensor: ...

    @classmethod
    def bytes_for(cls, width: int) -> int:
        """Memory that it takes."""
        return 4 * width


class Hessian(Statistic):
    """Σ x xᵀ / N, fp32 [K, K]: the curvature of a linear layer's squared output error (GPTQ, arXiv:2210.17323).

    Only tiles on and below the diagonal are summed; result() mirrors them in place, so [K, K] exists once.
    """

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._sum_KK = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._finished = False

    def _add(self, x_NK: Tensor) -> None:
        x_NK = x_NK.float()
        for start in range(0, self.width, TILE):
            stop = min(start + TILE, self.width)
            self._sum_KK[start:stop, :stop].addmm_(x_NK[:, start:stop].T, x_NK[:, :stop])

    @classmethod
    def bytes_for(cls, width: int) -> int:
        return 4 * width * width

    def result(self) -> Tensor:
        if not self._finished:
            self._finished = True
            self._sum_KK.div_(max(self.tokens, 1))
            for start in range(0, self.width, TILE):
                stop = min(start + TILE, self.width)
                self._sum_KK[:start, start:stop] = self._sum_KK[start:stop, :start].T
                tile = self._sum_KK[start:stop, start:stop]
                tile.copy_(tile.tril() + tile.tril(-1).T)
        return self._sum_KK


class AbsMax(Statistic):
    """Largest |x| per input channel, fp32 [K]."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._max_K = torch.zeros(width, dtype=torch.float32, device=device)

    def _add(self, x_NK: Tensor) -> None:
        torch.maximum(self._max_K, x_NK.abs().amax(dim=0).float(), out=self._max_K)

    def result(self) -> Tensor:
        return self._max_K


class SquaredMean(Statistic):
    """Mean of x² per input channel, fp32 [K]: the squared norms of Wanda (arXiv:2306.11695), divided by N."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._sum_K = torch.zeros(width, dtype=torch.float32, device=device)

    def _add(self, x_NK: Tensor) -> None:
        self._sum_K += x_NK.float().square().sum(dim=0)

    def result(self) -> Tensor:
        return self._sum_K / max(self.tokens, 1)
