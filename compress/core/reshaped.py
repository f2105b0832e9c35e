"""A checkpoint seen as a smaller one: without some of its tensors, rows and columns, cut as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.checkpoint import Checkpoint
from compress.core.cuts import Cuts, cut, shape_after
from compress.core.lazy import lazy_module
from compress.core.sizes import PER_LAYER_KEY, width_entries, widths_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core._skeleton import Skeleton
    from compress.core.safetensors_io import TensorInfo

torch = lazy_module("torch")

Change = Callable[["Tensor"], "Tensor"]


class ReshapedCheckpoint(Checkpoint):
    """`source` with other entries in its config, and without those named in `without`. `names`: new disk name -> the
    source's (None: all as they are); `cuts` and `changes` go by new names. A change works on what was cut, and on each
    row by itself. `files`: what auxiliary files hold instead, by name (None: they are left out)."""

    def __init__(
        self,
        source: Checkpoint,
        config: Mapping[str, Any],
        *,
        cuts: Cuts | None = None,
        names: Mapping[str, str] | None = None,
        changes: Mapping[str, Change] | None = None,
        without: Collection[str] = (),
        files: Mapping[str, bytes | None] | None = None,
    ) -> None:
        self._from = source
        self._cuts = dict(cuts or {})
        self._names = {name: name for name in source.tensors} if names is None else dict(names)
        self._changes = dict(changes or {})
        self._files = dict(files or {})
        tensors = {new: self._cut_info(new, source.info(old)) for new, old in self._names.items()}
        left = {key: value for key, value in source.config.items() if key not in without}
        super().__init__(source.folder, source.source, {**left, **config}, tensors)

    @property
    def origin(self) -> Checkpoint:
        return self._from.origin

    def _cut_info(self, name: str, info: TensorInfo) -> TensorInfo:
        shape = shape_after(info.shape, self._cuts.get(name, ()))
        size = info.bytes * math.prod(shape) // max(math.prod(info.shape), 1)
        return replace(info, name=name, shape=shape, end=info.start + size)

    @cached_property
    def skeleton(self) -> Skeleton:
        from compress.core._skeleton import Skeleton

        return Skeleton(self.folder, self.architecture, self.config, widths_of(self.config))

    @cached_property
    def aux_files(self) -> list[Path]:
        return [path for path in self._from.aux_files if self._files.get(path.name, b"") is not None]

    def aux_bytes(self, path: Path) -> bytes:
        content = self._files.get(path.name)
        return self._from.aux_bytes(path) if content is None else content

    def tensor(self, name: str) -> Tensor:
        self.info(name)
        return self._changed(name, cut(self._from.tensor(self._names[name]), self._cuts.get(name, ())))

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        cuts = self._cuts.get(name, ())
        for one in cuts:
            if one.dim == 0:
                row_ids = torch.tensor(one.kept)[row_ids]
        rows = self._from.rows(self._names[name], row_ids)
        return self._changed(name, cut(rows, (one for one in cuts if one.dim != 0)))

    def _changed(self, name: str, value: Tensor) -> Tensor:
        return self._changes[name](value) if name in self._changes else value

    def alters(self, name: str) -> bool:
        return name in self._cuts or name in self._changes or self._from.alters(self._names[name])


def with_blocks(
    source: Checkpoint, blocks: Sequence[int], config: Mapping[str, Any], *, without: Collection[str] = ()
) -> ReshapedCheckpoint:
    """`source` with these of its blocks alone, numbered anew. `config`: what follows from that beside their number;
    `without`: entries that do not hold any more."""
    names = dict(_renumbered(source, blocks)) | {name: name for name in source.rest_tensors()}
    widths = widths_of(source.config)
    own = {} if widths is None else width_entries([widths[block] for block in blocks])
    entries = {"num_hidden_layers": len(blocks), **own, **config}
    return ReshapedCheckpoint(source, entries, names=names, without={*without, PER_LAYER_KEY})


def _renumbered(source: Checkpoint, blocks: Sequence[int]) -> Iterator[tuple[str, str]]:
    for new, old in enumerate(blocks):
        before, after = source.block_name(old), source.block_name(new)
        yield from ((after + name.removeprefix(before), name) for name in source.block_tensors(old))
