"""Workspace: the folders of one output. `OUT.partial/` holds unfinished work, `OUT` appears by one rename.

OUT.partial/   lock, lock.holder, journal.jsonl, stages/NN-kind/, spill/, artifact/ (staged)
OUT.report/    run.json and the rendered report
OUT.stages/    stage folders of a finished run, with --keep-stages
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.core.errors import UsageError
from compress.core.files import make_folder, publish_dir, recover_replaced, remove_file, remove_tree, sha256_file
from compress.core.journal import Entry, Journal
from compress.core.lock import HOLDER_NAME, LOCK_NAME, FolderLock
from compress.core.manifest import MANIFEST_NAME


class Workspace:
    """Where the run for `output` works, and how its result is published."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.partial = self._beside("partial")
        self.report = self._beside("report")
        self.kept_stages = self._beside("stages")
        self.journal = self.partial / "journal.jsonl"
        self.stages = self.partial / "stages"
        self.spill = self.partial / "spill"
        self.staged = self.partial / "artifact"

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{suffix}")

    def used_bytes(self) -> int:
        """Bytes that an unfinished run already holds."""
        return _file_bytes(self.partial)

    def output_bytes(self) -> int:
        """Bytes of all files of the published artifact."""
        return _file_bytes(self.output)

    def stage(self, number: int, kind: str) -> Path:
        return self.stages / f"{number:02d}-{kind}"

    def refuse_existing(self) -> None:
        """UsageError if `output` exists and no unfinished run of ours may have put or want it there."""
        if not self.output.name:
            raise UsageError(f"{self.output} cannot be an output", hint="name a folder that is to be made")
        if self.output.exists() and not self.partial.exists():
            raise _exists(self.output)

    @contextmanager
    def opened(self, *, fresh: bool) -> Iterator[None]:
        """Make the partial folder and hold its lock; `fresh` throws unfinished work away first."""
        if not fresh:
            self.refuse_existing()
        make_folder(self.partial)
        with FolderLock(self.partial):
            recover_replaced(self.output)
            if fresh:
                self._clear()
            elif self.output.exists() and not self.journal.exists():
                self.close(keep_stages=False)  # a run that was killed while it removed its last leftovers
                raise _exists(self.output)
            remove_tree(self.spill)
            try:
                yield
            finally:
                if self.partial.exists() and not self.journal.exists():
                    self.close(keep_stages=False)  # refused before work: leave nothing

    def open_journal(self, fingerprint: dict[str, object], *, fresh: bool) -> Journal:
        """The journal. A run that may replace an older artifact says so in it, so that a resume may, too."""
        replaces = (Entry("replaces", {}),) if fresh and self.output.exists() else ()
        journal = Journal(self.journal, fingerprint, replaces)
        if self.output.exists() and journal.last("replaces") is None and not self.is_published(journal):
            raise _exists(self.output)
        return journal

    def is_published(self, journal: Journal) -> bool:
        """Whether the artifact that the journal calls ready stands at `output`."""
        ready = journal.last("ready")
        manifest = self.output / MANIFEST_NAME
        return ready is not None and manifest.is_file() and sha256_file(manifest) == ready["manifest_sha256"]

    def publish(self, journal: Journal) -> None:
        """Rename the staged artifact to `output`."""
        publish_dir(self.staged, self.output, replace=journal.last("replaces") is not None)

    def close(self, *, keep_stages: bool) -> None:
        """Everything is published: remove the partial folder, the journal last but for the lock's files."""
        if keep_stages and self.stages.exists():
            publish_dir(self.stages, self.kept_stages, replace=True)
        self._clear()
        remove_tree(self.partial)

    def _clear(self) -> None:
        """Remove all but the lock; the journal goes last, since what it calls finished must be there."""
        held = {LOCK_NAME, HOLDER_NAME, self.journal.name}
        for path in sorted(self.partial.iterdir()):
            if path.name not in held:
                remove_tree(path)
        remove_file(self.journal)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _exists(output: Path) -> UsageError:
    return UsageError("output exists", where=str(output), hint="choose another --output, or --fresh to replace it")
