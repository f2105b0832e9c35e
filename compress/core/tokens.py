"""Tokens: token ids with a hash that is equal everywhere, and the file that keeps them.

Shape legend: S samples, T tokens per sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.core.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_KIND = "compress token ids"
_INTEGERS = ("I16", "U16", "I32", "U32", "I64", "U8", "I8")


@dataclass(frozen=True)
class Tokens:
    """Token ids, `lengths` saying how many of each row count (None: all); right padding is never counted.

    `sha256` is over shape, ids and lengths, so it is equal on every machine for equal tokens.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | None
    sha256: str
    source: str

    @classmethod
    def of(cls, ids_ST: torch.Tensor, lengths_S: torch.Tensor | None = None, source: str = "") -> Tokens:
        """Tokens from ids; lengths that leave nothing out are dropped."""
        ids_ST = ids_ST.to(torch.int64).contiguous()
        if lengths_S is not None:
            lengths_S = lengths_S.to(torch.int64).contiguous()
            if bool((lengths_S == ids_ST.shape[1]).all()):
                lengths_S = None
        return cls(ids_ST, lengths_S, _hash(ids_ST, lengths_S), source)

    @property
    def counted(self) -> torch.Tensor:
        """Which ids count, bool [S, T]: all but padding."""
        if self.lengths is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    def renumbered(self, kept: Sequence[int]) -> Tokens:
        """The same tokens where only the ids in `kept` are left, in this order. InputError if others occur."""
        new = torch.full((max(int(self.ids.max()), *kept) + 1,), -1)
        new[torch.tensor(kept)] = torch.arange(len(kept))
        ids_ST = new[self.ids]
        gone_ST = (ids_ST < 0) & self.counted
        if bool(gone_ST.any()):
            raise InputError(
                f"token {int(self.ids[gone_ST][0])} is removed from the vocabulary, but occurs in the token ids that "
                "later stages are calibrated on",
                where=self.source,
                hint="calibrate on text, or keep more tokens: min_count: 1 keeps all that occur",
            )
        return Tokens.of(ids_ST.clamp_(min=0), self.lengths, self.source)

    @property
    def count(self) -> int:
        """Tokens that count, padding left out."""
        return int(self.ids.numel() if self.lengths is None else self.lengths.sum())

    def first(self, tokens: int) -> Tokens:
        """The first rows, about so many tokens of them: at least one row."""
        return self.rows(max(1, tokens // self.ids.shape[1]))

    def rows(self, count: int) -> Tokens:
        """The first rows, `count` of them or all that there are."""
        return Tokens.of(self.ids[:count], None if self.lengths is None else self.lengths[:count], self.source)


def _hash(ids_ST: torch.Tensor, lengths_S: torch.Tensor | None) -> str:
    digest = hashlib.sha256(f"tokens {tuple(ids_ST.shape)} {lengths_S is not None}\n".encode())
    for tensor in (ids_ST, lengths_S):
        if tensor is not None:
            digest.update(tensor.numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """One hash over the files that hold a tokenizer's vocabulary."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = Path(folder) / name
        if file.is_file():
            digest.update(f"{name}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def save_tokens(
    path: Path | str, tokens: Tokens, *, tokenizer_sha256: str = "", recipe: Mapping[str, Any] | None = None
):
    """Write `input_ids` (int32) and, where rows are padded, `lengths`; the header says where they come from."""
    from compress.core.files import write_safetensors

    tensors = [("input_ids", tokens.ids.to(torch.int32))]
    if tokens.lengths is not None:
        tensors.append(("lengths", tokens.lengths.to(torch.int32)))
    metadata = {
        "kind": _KIND,
        "sha256": tokens.sha256,
        "source": tokens.source,
        "tokenizer_sha256": tokenizer_sha256,
        "calibration": json.dumps(recipe or {}, sort_keys=True),
    }
    write_safetensors(Path(path), tensors, metadata=metadata)


def read_tokens(path: Path | str, *, tokenizer_sha256: str = "") -> Tokens:
    """Tokens from a .safetensors file with `input_ids` [S, T] and perhaps `lengths` [S], ours or another tool's.

    Raises InputError for wrong names, shapes and types, for lengths out of range, for a file whose header names another
    tokenizer than `tokenizer_sha256`, and for ids that do not match the header's own hash.
    """
    path = Path(path)
    tensors, metadata = _read_file(path)
    ids_ST, lengths_S = tensors["input_ids"], tensors.get("lengths")
    if ids_ST.dim() != 2 or 0 in ids_ST.shape:
        raise InputError(f"input_ids has shape {list(ids_ST.shape)} instead of [samples, tokens]", where=str(path))
    if lengths_S is not None:
        if lengths_S.shape != ids_ST.shape[:1]:
            raise InputError(f"lengths has shape {list(lengths_S.shape)} for {len(ids_ST)} samples", where=str(path))
        if int(lengths_S.min()) < 1 or int(lengths_S.max()) > ids_ST.shape[1]:
            raise InputError(f"a length is outside 1 … {ids_ST.shape[1]}", where=str(path))
    made_with = metadata.get("tokenizer_sha256", "")
    if made_with and tokenizer_sha256 and made_with != tokenizer_sha256:
        raise InputError("the token ids were made with another tokenizer than the model's", where=str(path))
    tokens = Tokens.of(ids_ST, lengths_S, path.name)
    if metadata.get("kind") == _KIND and metadata.get("sha256") != tokens.sha256:
        raise InputError("the token ids do not match the hash in the file's header", where=str(path))
    return tokens


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from compress.core.safetensors_io import load_tensor, read_header, read_metadata

    header = read_header(path)
    if "input_ids" not in header:
        there = ", ".join(sorted(header)[:5]) or "no tensor"
        raise InputError(f"a token file needs a tensor input_ids; it holds {there}", where=str(path))
    tensors = {}
    for name in ("input_ids", "lengths"):
        if name in header:
            if header[name].dtype not in _INTEGERS:
                raise InputError(f"{name} is {header[name].dtype}, not whole numbers", where=str(path))
            tensors[name] = load_tensor(header[name]).to(torch.int64)
    return tensors, read_metadata(path)
