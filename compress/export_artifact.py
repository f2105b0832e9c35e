"""`compress export`: a finished folder becomes another artifact, in another format, without calibrating again.

Published verified or not at all, and by one rename, as every artifact. Where codes and scales are carried over, the
figures of the artifact that it was written from hold; where gguf rounds weights anew they do not, and stay behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress
from compress.core.compatibility import Verdict, as_written, preflight
from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.events import Finished, Listener, Started, silent
from compress.core.files import Written, atomic_write, copy_file, make_folder, publish_dir, remove_tree, written_file
from compress.core.lock import FolderLock
from compress.core.manifest import MANIFEST_NAME, Coverage, FileRecord, Manifest
from compress.core.sizes import widths_of
from compress.export import require_writable, rewrite, shapes_of
from compress.export_gguf import write_gguf
from compress.facts import lineage
from compress.own_folders import is_artifact, is_partial, is_there
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.formats.gguf import Layout

FORMATS = ("awq", "bitsandbytes", "compressed-tensors", "gguf", "gptq")
_CARRIED = ("recipe.yaml", "evaluation.json")
_FROM = {"export": "exported_from", "level": "levelled_from"}


@dataclass(frozen=True)
class Exported:
    """The new artifact, the bytes of its files, who will load it, and what is worth knowing."""

    folder: Path
    bytes: int
    verdicts: tuple[Verdict, ...]
    notices: tuple[str, ...] = ()


def export_artifact(
    folder: Path,
    output: Path,
    format: str,
    *,
    type: str | None = None,
    requantize: bool = False,
    fresh: bool = False,
    tensor_parallel: int = 1,
    events: Listener = silent,
) -> Exported:
    """Write the model in `folder` to `output` in `format`. Raises CompressError before work for what cannot be held.

    Weights keep their values. Of gguf alone, dense matrices may be rounded to `type`, and `requantize` allows that for
    quantized ones, too. `fresh` may replace an older artifact of ours at `output`.
    """
    task = _Task(folder, format, type, requantize)
    verdicts = task.verdicts(tensor_parallel)
    with staged_at(output, folder, fresh=fresh) as staged:
        events(Started("export", task.source.num_blocks, "block"))
        files = task.write(staged)
        files |= describe(task.source, task.manifest, staged, format, verdicts, rounded=task.rounds)
        write_manifest(task.source, task.manifest, staged, files, {"export": {"format": format}})
        require_verified(staged)
        size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    events(Finished("export", str(output)))
    return Exported(output, size, tuple(verdicts), task.notices)


def preview(
    folder: Path,
    output: Path,
    format: str,
    *,
    type: str | None = None,
    requantize: bool = False,
    fresh: bool = False,
    tensor_parallel: int = 1,
) -> Exported:
    """What `export_artifact` would say, and refuse; writes nothing, and knows no size."""
    task = _Task(folder, format, type, requantize)
    _refuse(Workspace(output), folder, fresh=fresh)
    return Exported(output, 0, tuple(task.verdicts(tensor_parallel)), task.notices)


class _Task:
    """An export that can be done: source opened, verified and found to fit the format."""

    def __init__(self, folder: Path, format: str, type: str | None, requantize: bool) -> None:
        _check(format, type, requantize)
        self.format = format
        self.source, self.manifest = open_source(folder)
        self.layout: Layout | None = None
        if format != "gguf" or (self.source.schemes and not requantize):
            require_writable(self.source, format)
        if format == "gguf":
            from compress.core.formats import gguf

            self.layout = gguf.layout(self.source, type, requantize=requantize)

    @property
    def rounds(self) -> bool:
        """Whether some weights are rounded anew."""
        return self.layout is not None and len(self.layout.exact) < len(self.layout.origin)

    @property
    def notices(self) -> tuple[str, ...]:
        return () if self.layout is None else self.layout.notices

    def verdicts(self, tensor_parallel: int) -> list[Verdict]:
        """Who will load the result, split over so many devices."""
        schemes = as_written(self.source.schemes, self.format)
        shapes = shapes_of(self.source) if schemes else {}
        uneven = widths_of(self.source.config) is not None
        return preflight(schemes, shapes, self.format, tensor_parallel=tensor_parallel, uneven=uneven)

    def write(self, staged: Path) -> dict[str, Written]:
        """Weights and all that belongs to them; every value is compared with the source's."""
        if self.layout is None:
            return rewrite(self.source, staged, self.format)
        return write_gguf(self.source, staged, self.layout)


def _check(format: str, type: str | None, requantize: bool) -> None:
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", where="--format", hint=f"choose one of {', '.join(FORMATS)}")
    if format != "gguf" and (type is not None or requantize):
        option = "--type" if type is not None else "--requantize"
        raise UsageError(f"is of gguf alone: {format} keeps every weight as it is", where=option)


def open_source(folder: Path) -> tuple[Checkpoint, Manifest | None]:
    """A model folder, ours or another tool's; ours only if it is sound."""
    from compress.core.checkpoint import Checkpoint
    from compress.core.verify import verify

    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    source = Checkpoint.open(folder)
    failed = [check for check in verify(folder, level="integrity").checks if not check.ok]
    if failed:
        raise InputError(f"is not sound: {failed[0].name}: {failed[0].detail}", where=str(folder))
    path = folder / MANIFEST_NAME
    return source, Manifest.parse(path.read_text(encoding="utf-8"), where=str(path)) if path.is_file() else None


@contextmanager
def staged_at(output: Path, source: Path, *, fresh: bool) -> Iterator[Path]:
    """A folder to fill, which takes the place of `output` when the block ends; after an error nothing is left."""
    workspace = Workspace(output)
    _refuse(workspace, source, fresh=fresh)
    make_folder(workspace.partial)
    with FolderLock(workspace.partial):
        try:
            remove_tree(workspace.staged)
            yield make_folder(workspace.staged)
            publish_dir(workspace.staged, workspace.output, replace=fresh)
        finally:
            remove_tree(workspace.partial)


def _refuse(workspace: Workspace, source: Path, *, fresh: bool) -> None:
    """UsageError if the export would write over what is not ours, or over what it reads."""
    output, model = workspace.output.resolve(), source.resolve()
    if model.is_relative_to(output) or output.is_relative_to(model):
        raise UsageError("an output cannot be, hold or lie inside the source", where=str(workspace.output))
    if is_there(workspace.output):
        if not is_artifact(workspace.output):
            hint = "choose another --output, or move this away"
            raise UsageError("output exists and is no artifact of compress", where=str(workspace.output), hint=hint)
        if not fresh:
            hint = "choose another --output, or --fresh to replace it"
            raise UsageError("output exists", where=str(workspace.output), hint=hint)
    if is_there(workspace.partial) and (workspace.journal.exists() or not is_partial(workspace.partial)):
        raise UsageError("holds unfinished work", where=str(workspace.partial), hint="choose another --output")


def describe(
    source: Checkpoint,
    manifest: Manifest | None,
    staged: Path,
    format: str,
    verdicts: list[Verdict],
    *,
    rounded: bool = False,
) -> dict[str, Written]:
    """The files beside the weights: recipe and figures as the source has them, and a card of its own."""
    files = {} if rounded else carry_over(source, manifest, staged)
    weights = "matrices were rounded anew, so that the figures of the source do not hold"
    if not rounded:
        weights = "every weight means the same number, to the bit"
    figures = " `evaluation.json` holds the figures of the source." if "evaluation.json" in files else ""
    atomic_write(staged / "README.md", _card(source, format, verdicts, f"{weights}.{figures}"))
    return files | {"README.md": written_file(staged / "README.md")}


def carry_over(source: Checkpoint, manifest: Manifest | None, staged: Path) -> dict[str, Written]:
    """Recipe and figures of one of our artifacts, for another one that computes the same."""
    files = {}
    for name in _CARRIED if manifest is not None else ():
        if (source.folder / name).is_file():
            copy_file(source.folder / name, staged / name)
            files[name] = written_file(staged / name)
    return files


def front_matter(source: Checkpoint) -> str:
    """What the source's card tells the hub, with the lines around it and an empty one; nothing if it has none."""
    card = source.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = text.split("---\n", 2)[1] if text.startswith("---\n") and text.count("---\n") >= 2 else ""
    return f"---\n{front}---\n\n" if front else ""


def _card(source: Checkpoint, format: str, verdicts: list[Verdict], weights: str) -> str:
    lines = [
        f"# {source.source.id}, as {format}",
        "",
        f"Written by compress {compress.__version__} from a model in another format, without calibrating again:",
        weights,
        "",
        "## Who loads it",
        "",
        *(f"- {verdict.sentence}" for verdict in verdicts),
    ]
    return front_matter(source).replace("compressed-tensors", format) + "\n".join(lines) + "\n"


def write_manifest(
    source: Checkpoint,
    manifest: Manifest | None,
    staged: Path,
    files: dict[str, Written],
    work: dict[str, dict[str, str]],
    coverage: tuple[Coverage, ...] | None = None,
) -> None:
    """compress.json: lineage, recipe and coverage of the source, and from which files these were written. `work` says
    by which command, and with which options; `coverage` stands in for the source's."""
    digests = source.sha256()
    ((command, options),) = work.items()
    origin: dict[str, Any] = lineage(source) if manifest is None else manifest.lineage
    text = Manifest(
        version=compress.__version__,
        files=tuple(FileRecord(name, written.bytes, written.sha256) for name, written in files.items()),
        recipe={} if manifest is None else manifest.recipe,
        fingerprint={command: options | {"sha256": digests}} | ({} if manifest is None else manifest.fingerprint),
        lineage=origin | {_FROM[command]: digests},
        coverage=coverage or (_coverage(source) if manifest is None else manifest.coverage),
        stages=[] if manifest is None else manifest.stages,
        kv_cache=None if manifest is None else manifest.kv_cache,
    ).text()
    atomic_write(staged / MANIFEST_NAME, text)


def _coverage(source: Checkpoint) -> tuple[Coverage, ...]:
    from compress.core.formats import stored_modules

    stored = stored_modules(source)
    quantized = [Coverage(f"{module}.weight", "quantized", scheme.name) for module, scheme in source.schemes.items()]
    return (*quantized, *(Coverage(name, "kept") for name in source.tensors if name not in stored))


def require_verified(staged: Path) -> None:
    """ArtifactError unless the staged folder passes verification."""
    from compress.core.verify import verify

    report = verify(staged, library=True)
    failed = [check for check in report.checks if not check.ok]
    if failed:
        raise ArtifactError(
            f"the result does not pass verification and is not published: {failed[0].name}: {failed[0].detail}",
            where=str(staged),
        )
