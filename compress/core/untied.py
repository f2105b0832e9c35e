"""A tied model seen as one whose embedding and head are two tensors, so that each may become something else."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from compress.core.checkpoint import Checkpoint

if TYPE_CHECKING:
    from compress.core._skeleton import Skeleton


class UntiedCheckpoint(Checkpoint):
    """`source`, with its one matrix under the names of embedding and head, both read from the same bytes."""

    def __init__(self, source: Checkpoint) -> None:
        self._from = source
        stored = source.info(source.embedding_tensor)
        names = [f"{module}.weight" for module in (source.architecture.embedding, source.architecture.head)]
        others = {name: info for name, info in source.tensors.items() if name not in names}
        both = {name: replace(stored, name=name) for name in names}
        super().__init__(
            source.folder, source.source, {**source.config, "tie_word_embeddings": False}, {**others, **both}
        )

    @property
    def origin(self) -> Checkpoint:
        return self._from.origin

    @cached_property
    def skeleton(self) -> Skeleton:
        skeleton = super().skeleton
        skeleton.config.tie_word_embeddings = False
        return skeleton
