"""Batches: what a step is trained on. Those of a text follow from the number of the step and the seed alone.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from distill._settings import Training

NO_TARGET = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [B, T], and the token that each position should say next (-100: none). `rows_B` are the rows of the
    calibration text that these are, None for any other text."""

    ids_BT: Tensor
    target_BT: Tensor
    rows_B: Tensor | None = None

    @property
    def scored(self) -> int:
        """How many positions have a target."""
        return int((self.target_BT != NO_TARGET).sum())

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        found = {"ids": self.ids_BT, "target": self.target_BT}
        return found if self.rows_B is None else found | {"rows": self.rows_B}

    def share(self, rank: int, count: int) -> Batch:
        """What process `rank` of `count` computes: rows beside each other, as many as the others' or one more."""
        return self._part(slice(rank * len(self.ids_BT) // count, (rank + 1) * len(self.ids_BT) // count))

    def silent(self) -> Batch:
        """Its first row without any target."""
        first = self._part(slice(1))
        return replace(first, target_BT=torch.full_like(first.target_BT, NO_TARGET))

    def split(self, rows: int) -> Iterator[Batch]:
        """Batches of at most so many rows."""
        for start in range(0, len(self.ids_BT), rows):
            yield self._part(slice(start, start + rows))

    def _part(self, rows: slice) -> Batch:
        return Batch(self.ids_BT[rows], self.target_BT[rows], None if self.rows_B is None else self.rows_B[rows])


Batches = Callable[[int], Batch]
"""The batch of a step, by its number."""


def text_batches(settings: Training, tokens: Tokens) -> Batches:
    """Batches of the calibration text."""

    def batch(step: int) -> Batch:
        rows_B = batch_rows(settings, len(tokens.ids), step)
        return Batch(tokens.ids[rows_B], targets_of(tokens, rows_B), rows_B)

    return batch


def batch_rows(settings: Training, rows: int, step: int) -> Tensor:
    """Which rows step `step` is trained on, [B]: each pass over them has an order of its own."""
    places = torch.arange(step * settings.batch, (step + 1) * settings.batch)
    found = []
    for epoch in torch.unique(places // rows).tolist():
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(rows, generator=generator)
        found.append(order[places[places // rows == epoch] % rows])
    return torch.cat(found)


def targets_of(tokens: Tokens, rows: Tensor) -> Tensor:
    """The next token of each position, [B, T]; -100 behind the last one, and in padding."""
    ids_BT = tokens.ids[rows]
    target_BT = torch.full_like(ids_BT, NO_TARGET)
    target_BT[:, :-1] = ids_BT[:, 1:]
    if tokens.lengths is not None:
        inside_BT = torch.arange(ids_BT.shape[1]) < (tokens.lengths[rows] - 1)[:, None]
        target_BT[~inside_BT] = NO_TARGET
    return target_BT
