"""A checkpoint seen with other values for some of its tensors, which are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress.core.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


class ReplacedCheckpoint(Checkpoint):
    """`source` with `values` for the tensors of these disk names, of the same shapes."""

    def __init__(self, source: Checkpoint, values: Mapping[str, Tensor]) -> None:
        super().__init__(source.folder, source.source, source.config, source.tensors)
        self._from = source
        self._values = dict(values)
        for name, value in self._values.items():
            if tuple(value.shape) != tuple(self.info(name).shape):
                raise ValueError(f"{name}: {list(value.shape)} instead of {list(self.info(name).shape)}")

    @property
    def origin(self) -> Checkpoint:
        return self._from.origin

    def tensor(self, name: str) -> Tensor:
        return self._values[name] if name in self._values else self._from.tensor(name)

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        return self._values[name][row_ids] if name in self._values else self._from.rows(name, row_ids)

    def alters(self, name: str) -> bool:
        return name in self._values or self._from.alters(name)
