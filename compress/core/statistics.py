"""What a pass can ask the walk to measure on the inputs of a group: update(x) per micro-batch, result() at the end.

Shapes: N tokens, K input channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)
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

    def rescale(self, factor_K: Tensor) -> None:
        """Become the statistic of inputs whose channels are multiplied by `factor_K`."""
        raise NotImplementedError(f"{type(self).__name__} cannot follow inputs that are rescaled")

    @classmethod
    def bytes_for(cls, width: int) -> int:
        """Memory that it takes."""
        return 4 * width


class Hessian(Statistic):
    """Σ x xᵀ / N, fp32 [K, K]: the curvature of a linear layer's squared output error (GPTQ, arXiv:2210.17323).

    A GPU's tensor cores take inputs of 16 bits as they are: products of two such numbers are exact in fp32. Inputs in
    fp32 are multiplied in fp32, since torch leaves TF32 off unless it is told otherwise.

    Only tiles on and below the diagonal are summed; result() mirrors them in place, so [K, K] exists once.
    """

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._sum_KK = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._finished = False

    def _add(self, x_NK: Tensor) -> None:
        halves = x_NK.is_cuda and x_NK.dtype in _HALVES
        x_NK = x_NK if halves else x_NK.float()
        for start in range(0, self.width, TILE):
            stop = min(start + TILE, self.width)
            tile, left_NT, right_NK = self._sum_KK[start:stop, :stop], x_NK[:, start:stop], x_NK[:, :stop]
            if halves:
                tile.add_(torch.mm(left_NT.T, right_NK, out_dtype=torch.float32))
            else:
                tile.addmm_(left_NT.T, right_NK)

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

    def rescale(self, factor_K: Tensor) -> None:
        self._sum_KK.mul_(factor_K[:, None]).mul_(factor_K)


class AbsMax(Statistic):
    """Largest |x| per input channel, fp32 [K]."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._max_K = torch.zeros(width, dtype=torch.float32, device=device)

    def _add(self, x_NK: Tensor) -> None:
        torch.maximum(self._max_K, x_NK.abs().amax(dim=0).float(), out=self._max_K)

    def result(self) -> Tensor:
        return self._max_K

    def rescale(self, factor_K: Tensor) -> None:
        self._max_K *= factor_K.abs()


class SquaredMean(Statistic):
    """Mean of x² per input channel, fp32 [K]: the squared norms of Wanda (arXiv:2306.11695), divided by N."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._sum_K = torch.zeros(width, dtype=torch.float32, device=device)

    def _add(self, x_NK: Tensor) -> None:
        self._sum_K += x_NK.float().square().sum(dim=0)

    def result(self) -> Tensor:
        return self._sum_K / max(self.tokens, 1)

    def rescale(self, factor_K: Tensor) -> None:
        self._sum_K *= factor_K.square()


class Mean(Statistic):
    """Mean of x per input channel, fp32 [K]."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._sum_K = torch.zeros(width, dtype=torch.float32, device=device)

    def _add(self, x_NK: Tensor) -> None:
        self._sum_K += x_NK.float().sum(dim=0)

    def result(self) -> Tensor:
        return self._sum_K / max(self.tokens, 1)

    def rescale(self, factor_K: Tensor) -> None:
        self._sum_K *= factor_K


class Sample(Statistic):
    """Some of the inputs themselves, fp32 [≤ ROWS, K]: of every update a few rows, evenly spaced, until there are ROWS.

    For what no sum can tell, such as the rounding of activations per token.
    """

    ROWS = 512
    ROWS_PER_UPDATE = 64

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        super().__init__(width, device)
        self._rows: list[Tensor] = []
        self._result_NK: Tensor | None = None

    def _add(self, x_NK: Tensor) -> None:
        room = min(self.ROWS - sum(len(rows) for rows in self._rows), self.ROWS_PER_UPDATE)
        if room > 0:
            step = -(-len(x_NK) // room)
            self._rows.append(x_NK[::step].float().clone())

    @classmethod
    def bytes_for(cls, width: int) -> int:
        return 4 * width * cls.ROWS

    def result(self) -> Tensor:
        if self._result_NK is None:
            self._result_NK = torch.cat(self._rows) if self._rows else torch.zeros(0, self.width, device=self.device)
            self._rows = []
        return self._result_NK

    def rescale(self, factor_K: Tensor) -> None:
        self._result_NK = self.result() * factor_K
