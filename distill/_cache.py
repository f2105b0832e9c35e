"""A folder with a teacher's distributions: what they are of, shards of some rows of the text each, and their hashes.

`shards.jsonl` is a journal: its first line is the header, everything that decides the distributions; then a line with
the SHA-256 of each shard, once that is durable. A shard is a safetensors file that repeats the header. A run that was
killed goes on behind the last line, with the same bytes.

Shape suffixes: N positions with a next token, R rows, M tokens kept at all positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.files import make_folder, sha256_files, write_safetensors
from compress.core.journal import Journal, canonical, differences, recorded_fingerprint
from compress.core.lock import HOLDER_NAME, LOCK_NAME
from compress.core.safetensors_io import load_tensor, read_header
from distill._cache_settings import Cache
from distill._sparse import Sparse, decode

if TYPE_CHECKING:
    from compress.core.calibration import Tokens

SCHEMA_VERSION = 1
JOURNAL_NAME = "shards.jsonl"
SHARD_TOKENS = 1 << 16  # about so many positions in a shard, whatever the machine
OF_TOKENS = ("ids", "counts", "log_p")  # these are as long as what is kept, the others as positions
OPEN_SHARDS = 64


class TeacherCache:
    """The distributions for all rows of `tokens`, as far as they are written.

    ArtifactError for shards that are not as they were written, InputError for a folder with something else in it.
    """

    def __init__(self, folder: Path, settings: Cache, tokens: Tokens, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.vocabulary: int = header["vocabulary"]
        self._header = canonical(header)
        self._settings = settings
        rows, length = tokens.ids.shape
        self._rows_each = max(1, SHARD_TOKENS // length)
        self._count = -(-rows // self._rows_each)
        self.positions_R = positions(tokens)
        _require_same(folder, header)
        self._journal = Journal(make_folder(folder) / JOURNAL_NAME, header)
        self._require_whole()
        self._opened = lru_cache(OPEN_SHARDS)(self._open)

    @property
    def missing(self) -> range:
        """Numbers of the shards that are still to be written."""
        return range(len(self._shards), self._count)

    @property
    def bytes(self) -> int:
        """Of all shards that are there."""
        return sum(shard["bytes"] for shard in self._shards)

    @property
    def sha256(self) -> str:
        """One hash of all that is there."""
        return hashlib.sha256(canonical(self._shards).encode()).hexdigest()

    @property
    def token_count(self) -> int:
        """Positions of the whole text that have a next token."""
        return int(self.positions_R.sum())

    def rows(self, number: int) -> range:
        """The rows of the text in a shard."""
        return range(number * self._rows_each, min((number + 1) * self._rows_each, len(self.positions_R)))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard: the rows of `missing[0]` one after the other."""
        name = f"shard-{self.missing[0]:06d}.safetensors"
        written = write_safetensors(self.folder / name, tensors.items(), {"teacher_cache": self._header})
        self._journal.add("shard", {"file": name, **asdict(written)})

    def batch(self, rows_B: Tensor) -> Sparse:
        """The distributions at all positions of these rows that have a next token, row by row."""
        found = [self._row(row) for row in rows_B.tolist()]
        return decode(self._settings, {name: torch.cat([row[name] for row in found]) for name in found[0]})

    def _row(self, row: int) -> dict[str, Tensor]:
        shard = self._opened(row // self._rows_each)
        place = row % self._rows_each
        return {
            name: tensor[slice(*(shard.entry_starts if name in OF_TOKENS else shard.starts)[place : place + 2])]
            for name, tensor in shard.tensors.items()
        }

    def _open(self, number: int) -> _Shard:
        infos = read_header(self.folder / self._shards[number]["file"])
        tensors = {name: load_tensor(info) for name, info in infos.items()}
        rows = self.rows(number)
        starts_R = _starts(self.positions_R[rows.start : rows.stop])
        entry_starts_N = _starts(tensors["lengths"].long())
        return _Shard(tensors, starts_R.tolist(), entry_starts_N[starts_R].tolist())

    @property
    def _shards(self) -> list[dict[str, Any]]:
        return list(self._journal.of("shard"))

    def _require_whole(self) -> None:
        hashes = {self.folder / shard["file"]: shard["sha256"] for shard in self._shards}
        gone = [path for path in hashes if not path.is_file()]
        found = {} if gone else sha256_files(hashes)
        for path in gone or (path for path, sha256 in hashes.items() if found[path] != sha256):
            raise ArtifactError(
                f"this shard of the teacher cache {'is missing' if gone else 'is not as it was written'}",
                where=str(path),
                hint="remove the cache's folder: it will be written anew",
            )


@dataclass(frozen=True, slots=True)
class _Shard:
    """Its tensors, mapped; where each row begins among the positions and among the tokens kept, and where all end."""

    tensors: dict[str, Tensor]
    starts: list[int]
    entry_starts: list[int]


def positions(tokens: Tokens) -> Tensor:
    """How many positions of each row have a next token, [R]."""
    rows, length = tokens.ids.shape
    lengths_R = torch.full((rows,), length) if tokens.lengths is None else tokens.lengths
    return (lengths_R - 1).clamp(min=0)


def _starts(sizes_N: Tensor) -> Tensor:
    return torch.cat([sizes_N.new_zeros(1), sizes_N.cumsum(0)])


def _require_same(folder: Path, header: Mapping[str, Any]) -> None:
    """InputError unless the folder is not there, or empty, or holds a cache with this header."""
    path = folder / JOURNAL_NAME
    if not path.exists():
        ours = {LOCK_NAME, HOLDER_NAME, f".{JOURNAL_NAME}.tmp"}
        others = {entry.name for entry in folder.iterdir()} - ours if folder.is_dir() else set()
        if others:
            raise InputError(
                f"this is no teacher cache: {min(others)} is here", where=str(folder), hint="choose another folder"
            )
        return
    try:
        recorded = recorded_fingerprint(path)
    except UsageError as error:
        hint = "remove the cache's folder: it will be written anew"
        raise ArtifactError("the list of shards is damaged", where=error.where, hint=hint) from error
    changed = differences(recorded, dict(header))
    if recorded is not None and changed:
        raise InputError(
            f"the teacher cache that lies here is another one than the recipe asks for: {'; '.join(changed)}",
            where=str(folder),
            hint="choose another cache.folder",
        )
