"""A model folder as one GGUF file: written piece by piece, read back and compared before anybody sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.files import Written, atomic_file
from compress.core.formats import gguf

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

FILE_NAME = "model.gguf"


def write_gguf(source: Checkpoint, staged: Path, planned: gguf.Layout) -> dict[str, Written]:
    """Write the file that `gguf.layout` planned into `staged`; one tensor at a time is in memory.

    ArtifactError if what was written, read by a second decoder, does not mean what the source does.
    """
    path = staged / FILE_NAME
    written = _write(path, gguf.pieces(planned.metadata, planned.tensors))
    gguf.check(path, source, planned)
    return {FILE_NAME: written}


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    digest, size = hashlib.sha256(), 0
    with atomic_file(path) as stream:
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
            size += len(piece)
    return Written(size, digest.hexdigest())
