"""Windows: the text of an evaluation as rows of token ids, with what is scored in each row.

A row predicts its tokens from the ones before them. Row i scores the tokens at positions score_from[i] … lengths[i]-1;
what stands before score_from is context only, so that every token is scored once. Shape legend: R rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.core.calibration import Encoder, Tokens
from compress.core.documents import Document, local_path, read_documents
from compress.core.errors import InputError, UsageError

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Perplexity

JOINT = "\n\n"


@dataclass(frozen=True)
class Windows:
    """Rows to score. `unit[i]` is the document (or, in joined text, the window) that row i belongs to."""

    tokens: Tokens
    score_from: np.ndarray
    unit: np.ndarray
    text_tokens: int
    text_bytes: int
    protocol: dict[str, Any]

    @property
    def lengths(self) -> np.ndarray:
        rows, width = self.tokens.ids.shape
        return np.full(rows, width) if self.tokens.lengths is None else self.tokens.lengths.numpy()

    @property
    def scored(self) -> int:
        return int((self.lengths - self.score_from).sum())


def read_windows(
    settings: Perplexity, checkpoint: Checkpoint, base_folder: Path | str | None, *, offline: bool = False
) -> Windows:
    """The rows that `settings` asks for.

    `documents: true` scores each document by itself. Otherwise the documents are laid end to end: joined by a blank
    line and encoded as one text, or, with a prefix, encoded one by one. Raises InputError for text that cannot be read.
    """
    from compress.core.checkpoint import load_tokenizer

    stride = settings.stride or settings.window
    if stride > settings.window:
        raise UsageError(f"evaluate.perplexity.stride {stride} skips text: it is larger than window {settings.window}")
    require_window(settings.window, checkpoint)
    texts = _read_texts(settings, base_folder, offline)
    encode = Encoder(load_tokenizer(checkpoint.folder), settings.special_tokens, settings.prefix)
    encoded = _encode(texts, encode, settings)
    rows, score_from, unit = _cut(encoded, settings.window, stride, by_row=not settings.documents)
    if not rows:
        raise InputError("the evaluation text has no token to score", where=settings.dataset)
    tokens = _as_tokens(rows, settings.dataset)
    encodings = 1 if not settings.documents and not settings.prefix else len(texts)
    overhead = len(encode("")) * encodings
    windows = Windows(
        tokens,
        score_from,
        unit,
        text_tokens=max(1, sum(map(len, encoded)) - overhead),
        text_bytes=max(1, sum(len(text.encode()) for text in texts) + _joint_bytes(texts, settings)),
        protocol={},
    )
    windows.protocol.update(_protocol(settings, windows, base_folder, len(texts), stride))
    return windows


def require_window(window: int, checkpoint: Checkpoint) -> None:
    """UsageError for a window that is longer than what the model was made for."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and window > limit:
        raise UsageError(
            f"evaluate.perplexity.window {window} is more than the model's {limit} positions",
            hint=f"compress eval takes --window {limit}, a recipe evaluate.perplexity.window={limit} and "
            f"evaluate.perplexity.stride={limit // 2}",
        )


def _read_texts(settings: Perplexity, base_folder: Path | str | None, offline: bool) -> list[str]:
    one_text = not settings.documents and not settings.prefix
    documents: Sequence[Document] = read_documents(
        settings.dataset,
        field=settings.field,
        split=settings.split,
        base_folder=base_folder,
        offline=offline,
        keep_blank=one_text,
    )
    texts = [document for document in documents[: settings.samples] if isinstance(document, str)]
    if len(texts) < len(documents[: settings.samples]):
        raise InputError(f"field {settings.field!r} holds messages, not text", where=settings.dataset)
    return texts


def _encode(texts: list[str], encode: Encoder, settings: Perplexity) -> list[list[int]]:
    """One list of ids per stretch of text that shares context."""
    if settings.documents:
        return [encode(text) for text in texts]
    if settings.prefix:
        return [[token for text in texts for token in encode(text)]]
    return [encode(JOINT.join(texts))]


def _joint_bytes(texts: list[str], settings: Perplexity) -> int:
    return 0 if settings.documents or settings.prefix else len(JOINT) * (len(texts) - 1)


def _cut(
    encoded: list[list[int]], window: int, stride: int, *, by_row: bool
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    rows, score_from, unit = [], [], []
    for number, ids in enumerate(encoded):
        done = 0
        for start in range(0, len(ids), stride):
            row = ids[start : start + window]
            first = max(1, done - start)
            if first < len(row):
                rows.append(row)
                score_from.append(first)
                unit.append(len(rows) - 1 if by_row else number)
            done = start + len(row)
            if done == len(ids):
                break
    return rows, np.array(score_from, dtype=np.int64), np.unique(unit, return_inverse=True)[1]


def _as_tokens(rows: list[list[int]], source: str) -> Tokens:
    ids_RT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids_RT[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return Tokens.of(ids_RT, torch.tensor([len(row) for row in rows]), source)


def _protocol(
    settings: Perplexity, windows: Windows, base_folder: Path | str | None, documents: int, stride: int
) -> dict[str, Any]:
    path = local_path(settings.dataset, base_folder)
    return {
        "text": settings.dataset if path is None else path.name,
        "field": settings.field,
        "split": settings.split if path is None else None,
        "documents": "each by itself" if settings.documents else "end to end",
        "documents_read": documents,
        "window": settings.window,
        "stride": stride,
        "special_tokens": settings.special_tokens,
        "prefix": settings.prefix,
        "windows": len(windows.score_from),
        "tokens_scored": windows.scored,
        "text_bytes": windows.text_bytes,
        "token_sha256": windows.tokens.sha256,
    }
