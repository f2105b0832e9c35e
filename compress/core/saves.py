"""Saves: where a stage that trains is, so that a run which was killed goes on from there. The newest two are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import ArtifactError
from compress.core.files import make_folder, remove_file, sha256_file, write_entries, written_file
from compress.core.journal import Journal
from compress.core.safetensors_io import load_tensor, read_header
from compress.core.safetensors_layout import Entry
from compress.core.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2


@dataclass(frozen=True)
class Save:
    """Tensors by name, and plain data: the state after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    data: Mapping[str, Any]


class Saves:
    """The saves of one stage. A save is durable before the journal names it."""

    def __init__(self, folder: Path, journal: Journal, stage: int, watch: Stopwatch | None = None) -> None:
        self._folder = folder
        self._journal = journal
        self._stage = stage
        self._watch = watch or Stopwatch()

    def folder(self, name: str) -> Path:
        """Where all stages of the run find what one of them has written; it goes when the run is over."""
        return self._folder / name

    def latest(self) -> Save | None:
        """The newest one, None if there is none. ArtifactError if its file is not as the journal says."""
        entries = self._entries()
        if not entries:
            return None
        newest = entries[-1]
        path = self._folder / newest["file"]
        if not path.is_file() or sha256_file(path) != newest["sha256"]:
            raise ArtifactError("a saved state is not as the journal says", where=str(path), hint="--fresh starts over")
        tensors = {name: load_tensor(info) for name, info in read_header(path).items()}
        return Save(newest["step"], tensors, newest["data"])

    def add(self, step: int, entries: Iterable[Entry], data: Mapping[str, Any]) -> None:
        """Keep the state after `step` steps; all saves but the newest two are removed."""
        make_folder(self._folder)
        name = f"{self._stage:02d}-{step:08d}.safetensors"
        write_entries(self._folder / name, entries)
        line = {"stage": self._stage, "step": step, "file": name, "data": data}
        line |= {**asdict(written_file(self._folder / name)), "seconds": self._watch.lap()}
        self._journal.add("save", line)
        for entry in self._entries()[:-KEPT]:
            remove_file(self._folder / entry["file"])

    def _entries(self) -> list[dict[str, Any]]:
        return [data for data in self._journal.of("save") if data["stage"] == self._stage]
