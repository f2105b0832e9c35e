"""A model with an adapter merged into it: computed in fp32 as it is read, rounded once to the dtype of the weight.

It is written to a folder of its own before the first stage, a block at a time, so that all that comes later reads a
model like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core._model_folder import read_tensors
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError
from compress.core.events import Finished, Listener, Progress, Started
from compress.core.files import copy_file, make_folder, write_entries
from compress.core.journal import Journal
from compress.core.lazy import lazy_module
from compress.core.model_files import INDEX_NAME, SHARD_METADATA, shard_index, shard_name, write_json
from compress.core.safetensors_io import load_tensor, raw_bytes
from compress.core.safetensors_layout import Entry, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.adapter import Adapter, Pair

torch = lazy_module("torch")

AT_ONCE = 1 << 24  # numbers of a weight that are in fp32 together


class MergedCheckpoint(Checkpoint):
    """`base` with the pairs of `adapter` in its weights. InputError if they do not fit together."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        if base.kind != "dense":
            raise InputError(
                f"an adapter is merged into dense weights, and {base.source.id} is {base.kind}",
                where=str(adapter.folder),
                hint="start from the model before it was compressed",
            )
        super().__init__(base.folder, base.source, base.config, base.tensors)
        self._adapter = adapter
        self.pairs: dict[str, Pair] = adapter.pairs(base)
        self._base = base

    @cached_property
    def _sha256(self) -> dict[str, str]:
        own = {f"adapter: {name}": digest for name, digest in self._adapter.sha256().items()}
        return self._base.sha256() | own

    def alters(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.pairs

    def tensor(self, name: str) -> Tensor:
        stored = super().tensor(name)
        pair = self.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return stored
        found = torch.empty_like(stored)
        for rows in torch.arange(len(stored)).split(max(1, AT_ONCE // stored.shape[1])):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            found[part] = _sum(stored[part], pair, part)
        return found

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        stored = super().rows(name, row_ids)
        pair = self.pairs.get(name.removesuffix(".weight"))
        return stored if pair is None else _sum(stored, pair, row_ids)


def _sum(weight_OK: Tensor, pair: Pair, rows: slice | Tensor) -> Tensor:
    """W + scale · B A of these rows, in the dtype of W."""
    update_OK = load_tensor(pair.b)[rows].float() @ load_tensor(pair.a).float() * pair.scale
    return update_OK.add_(weight_OK.float()).to(weight_OK.dtype)


class WrittenCheckpoint(Checkpoint):
    """`source` as it was written to `folder`: it still goes by the name and the hashes of what it was made from."""

    def __init__(self, folder: Path, source: Checkpoint) -> None:
        super().__init__(folder, source.source, source.config, read_tensors(folder))
        self._made_from = source

    @cached_property
    def _sha256(self) -> dict[str, str]:
        return self._made_from.sha256()


def write_merged(source: MergedCheckpoint, folder: Path, journal: Journal, events: Listener) -> Checkpoint:
    """Write it to `folder`, but for the shards that the journal names. ArtifactError if one of these is not as it
    says."""
    make_folder(folder)
    blocks = [source.block_tensors(index) for index in range(source.num_blocks)]
    shards = {shard_name(index, len(blocks)): names for index, names in enumerate([*blocks, source.rest_tensors()])}
    done = {data["file"]: data["bytes"] for data in journal.of("merged")}
    events(Started("merge", len(shards), "shard"))
    for number, (name, names) in enumerate(shards.items(), 1):
        if name not in done:
            written = write_entries(folder / name, _entries(source, names), SHARD_METADATA)
            journal.add("merged", {"file": name, **asdict(written)})
        elif not (folder / name).is_file() or (folder / name).stat().st_size != done[name]:
            hint = "--fresh starts over"
            raise ArtifactError("a merged shard is not as the journal says", where=str(folder / name), hint=hint)
        events(Progress("merge", number, len(shards)))
    for relative in source.aux_files:
        copy_file(source.folder / relative, folder / relative)
    write_json(folder / "config.json", source.config)
    write_json(folder / INDEX_NAME, shard_index(folder, shards))
    events(Finished("merge", f"an adapter of {len(source.pairs)} layers"))
    return WrittenCheckpoint(folder, source)


def _entries(source: MergedCheckpoint, names: list[str]) -> Iterator[Entry]:
    for name in names:
        info = source.info(name)
        if source.alters(name):
            yield Entry(name, info.dtype, info.shape, lambda name=name: tensor_bytes(source.tensor(name)))
        else:
            yield Entry(name, info.dtype, info.shape, lambda info=info: raw_bytes(info))
