"""Workspace: the folders of one output. `OUT.partial/` holds unfinished work, `OUT` appears by one rename.

OUT.partial/   lock, lock.holder, journal.jsonl, stages/NN-kind/, spill/, saves/, kept/, merged/,
               artifact/ (staged)
OUT.report/    run.json and the rendered report
OUT.stages/    stage folders of a finished run, with --keep-stages
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.errors import InputError, UsageError
from compress.core.files import (
    aside_of,
    make_folder,
    publish_dir,
    recover_replaced,
    remove_file,
    remove_tree,
    sha256_file,
)
from compress.core.journal import Entry, Journal, finished_units
from compress.core.lock import HOLDER_NAME, LOCK_NAME, FolderLock
from compress.core.manifest import MANIFEST_NAME
from compress.own_folders import (
    JOURNAL_NAME,
    is_artifact,
    is_partial,
    is_report,
    is_stages,
    is_there,
    refuse_inputs,
)

if TYPE_CHECKING:
    from compress.core.recipe import Recipe


class Workspace:
    """Where the run for `output` works, and how its result is published."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        if self.output.name in ("", ".."):
            raise UsageError("this cannot be an output", where=str(output), hint="name a folder that is to be made")
        self.partial = self._beside("partial")
        self.report = self._beside("report")
        self.kept_stages = self._beside("stages")
        self.journal = self.partial / JOURNAL_NAME
        self.stages = self.partial / "stages"
        self.spill = self.partial / "spill"
        self.saves = self.partial / "saves"
        self.kept = self.partial / "kept"
        self.merged = self.partial / "merged"
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

    def refuse(self, recipe: Recipe, *, fresh: bool, keep_stages: bool) -> None:
        """UsageError if a run would write over what is not ours, or over what it reads. Call it before any work.

        Without `fresh`, also if `output` exists and no unfinished run of ours may have put or want it there.
        """
        stages = [self.kept_stages] if keep_stages else []
        refuse_inputs([self.output, self.partial, *stages], recipe)
        if is_there(self.output) and not is_artifact(self.output):
            raise _foreign(self.output, "output exists and is no artifact of compress, so it is never replaced")
        ours = [(self.partial, is_partial), (self.report, is_report), *((folder, is_stages) for folder in stages)]
        for folder, is_ours in ours:
            if is_there(folder) and not is_ours(folder):
                raise _foreign(folder, "the run would write here, but what is here is not of compress")
        aside = aside_of(self.output)
        if is_there(aside) and not self.journal.exists():
            raise _foreign(aside, "an older output would be moved here, but something is here already")
        if not fresh and is_there(self.output) and not self.partial.exists():
            raise _exists(self.output)

    @contextmanager
    def opened(self, *, fresh: bool) -> Iterator[None]:
        """Make the partial folder and hold its lock; `fresh` throws unfinished work away first.

        Whether these folders may be written to is for `refuse` to say, before.
        """
        make_folder(self.partial)
        with FolderLock(self.partial):
            if self.journal.exists():
                recover_replaced(self.output)
            if fresh:
                self._clear()
            elif self.output.exists() and not self.journal.exists():
                self.close(keep_stages=False)  # a run that was killed while it removed its last leftovers
                raise _exists(self.output)
            remove_tree(self.spill)
            try:
                yield
            except InputError:
                if finished_units(self.journal) == 0:
                    self.close(keep_stages=False)  # nothing to go on with once the input is mended
                raise
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


def _foreign(folder: Path, message: str) -> UsageError:
    return UsageError(message, where=str(folder), hint="choose another --output, or move this away")
