"""Kept: tensors that a stage makes before its work proper, once for all processes that work on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.errors import ArtifactError
from compress.core.files import make_folder, sha256_file, write_safetensors, written_file
from compress.core.journal import Journal
from compress.core.safetensors_io import load_tensor, read_header

if TYPE_CHECKING:
    from torch import Tensor


class Kept:
    """What one stage has made, by name. A file is durable before the journal names it."""

    def __init__(self, folder: Path, journal: Journal, stage: int) -> None:
        self._folder = folder
        self._journal = journal
        self._stage = stage

    def __call__(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` gives, read from its file; ArtifactError if that is not as the journal says."""
        path = self._folder / f"{self._stage:02d}-{name}.safetensors"
        written = next((data for data in self._journal.of("kept") if data["file"] == path.name), None)
        if written is None:
            make_folder(self._folder)
            write_safetensors(path, compute().items())
            self._journal.add("kept", {"file": path.name, **asdict(written_file(path))})
        elif not path.is_file() or sha256_file(path) != written["sha256"]:
            hint = "--fresh starts over"
            raise ArtifactError("a file of this stage is not as the journal says", where=str(path), hint=hint)
        return {tensor: load_tensor(info) for tensor, info in read_header(path).items()}
