"""The only code that writes, renames, links, fsyncs or removes.

A file appears by: temporary file in the same folder, write, flush, fsync, rename, fsync of the folder. A folder appears
by one rename. Temporary names are fixed (`.NAME.tmp`), so that a run which was killed and started again writes over
what it left behind; where two processes may meet, the caller holds a FolderLock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from compress.core.errors import ArtifactError, CompressError, ResourceError, UsageError
from compress.core.safetensors_layout import Entry, header, ordered, tensor_entry

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_BYTES = 1 << 22
_NOT_ALLOWED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def io_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError into one sentence: ResourceError (exit 4) for the disk, UsageError (exit 2) for permissions."""
    try:
        yield
    except OSError as error:
        raise _refusal(error, doing, path) from error


def _refusal(error: OSError, doing: str, path: Path) -> CompressError:
    reason = error.strerror or str(error)
    if error.errno in _NOT_ALLOWED:
        return UsageError(f"cannot {doing}: {reason}", where=str(path), hint="choose an output that you may write to")
    if error.errno in _NO_SPACE:
        hint = "free some space and run the same command again: finished work is kept"
        return ResourceError(f"cannot {doing}: the disk is full", where=str(path), hint=hint)
    hint = "run the same command again once the disk works: finished work is kept"
    return ResourceError(f"cannot {doing}: {reason}", where=str(path), hint=hint)


def sync_folder(path: Path) -> None:
    """Make the names in folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends without an error it is durable and called `path`.

    After an error the temporary file is gone and whatever was at `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with io_errors("write the file", path):
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, durably and at once."""
    with atomic_file(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is durable: its size and SHA-256, taken while it was written."""

    bytes: int
    sha256: str


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write named tensors as one safetensors file, durably and at once. Equal tensors give equal bytes."""
    return write_entries(path, [tensor_entry(name, tensor) for name, tensor in tensors], metadata)


def write_entries(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> Written:
    """As `write_safetensors`, but each tensor's bytes are produced only when their turn comes."""
    placed = ordered(entries)
    digest = hashlib.sha256()
    size_bytes = 0
    with atomic_file(path) as stream:
        for piece in _pieces(placed, metadata):
            stream.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
    return Written(size_bytes, digest.hexdigest())


def _pieces(entries: list[Entry], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    yield header(entries, metadata)
    for entry in entries:
        data = entry.produce()
        if data.nbytes != entry.bytes:
            raise ArtifactError(f"tensor {entry.name!r} has {data.nbytes} bytes where {entry.bytes} were announced")
        yield from (data[start : start + _CHUNK_BYTES] for start in range(0, data.nbytes, _CHUNK_BYTES))


def append_durably(path: Path, data: bytes | str) -> None:
    """Append `data` (text as UTF-8) to the existing file `path` and fsync it.

    A crash may leave a torn end: whoever reads must check.
    """
    with io_errors("write the file", path), open(path, "ab") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())


def truncate(path: Path, length_bytes: int) -> None:
    """Cut `path` to `length_bytes`, durably."""
    with io_errors("shorten the file", path), open(path, "r+b") as stream:
        stream.truncate(length_bytes)
        stream.flush()
        os.fsync(stream.fileno())


def report_folder(path: Path) -> Path:
    """Make folder `path` for a report. UsageError for a model's: with other files in it, it no longer verifies."""
    held = next((name for name in ("compress.json", "config.json") if (path / name).exists()), None)
    if held:
        raise UsageError(
            f"is a model's folder (it holds {held}): a report would not belong in it",
            where=str(path),
            hint="choose another --output",
        )
    return make_folder(path)


def make_folder(path: Path) -> Path:
    """Make folder `path` and its parents, durably; an existing folder is fine."""
    with io_errors("make the folder", path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir(exist_ok=True)
            except FileNotFoundError as error:  # the parent is there, but takes no folders: /proc, for one
                raise PermissionError(errno.EPERM, "nothing can be made here", str(folder)) from error
            sync_folder(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of the durable file `source`: a hard link where the file system can, else a copy."""
    with io_errors("link the file", target):
        if target.exists():
            target.unlink()
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in _NO_SPACE or error.errno == errno.EIO:
                raise
            copy_file(source, target)
        sync_folder(target.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of `source` to `target`, durably and at once."""
    with atomic_file(target) as writer, open(source, "rb") as reader:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)


def publish_dir(staged: Path, final: Path, *, replace: bool = False) -> None:
    """Move folder `staged` to `final` by one rename, durably.

    Without `replace`, `final` must not exist. With it, a folder at `final` is first moved aside to `.NAME.old` and
    removed once the new one stands; what a run killed in between leaves is for `recover_replaced`.
    """
    aside = aside_of(final)
    with io_errors("publish the folder", final):
        sync_folder(staged)
        if final.exists() or final.is_symlink():
            if not replace:
                raise UsageError("output exists", where=str(final), hint="choose another --output or pass --fresh")
            remove_tree(aside)
            sync_folder(final)
            os.rename(final, aside)
        try:
            if aside.exists():
                sync_folder(final.parent)
            os.rename(staged, final)
        except OSError:
            if aside.exists():
                os.rename(aside, final)
            raise
        sync_folder(final.parent)
    remove_tree(aside)


def recover_replaced(final: Path) -> None:
    """Undo what a kill inside `publish_dir(replace=True)` left: the older folder returns, or goes if replaced."""
    aside = aside_of(final)
    if not aside.exists():
        return
    if final.exists():
        remove_tree(aside)
        return
    with io_errors("restore the folder", final):
        sync_folder(aside)
        os.rename(aside, final)
        sync_folder(final.parent)


def aside_of(final: Path) -> Path:
    """Where the older folder at `final` is while it is exchanged."""
    return final.with_name(f".{final.name}.old")


def remove_file(path: Path) -> None:
    """Remove file `path`, durably; a missing one is fine."""
    with io_errors("remove the file", path):
        if path.exists() or path.is_symlink():
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove folder `path` with all it holds, durably; links are removed, never followed. A missing one is fine."""
    with io_errors("remove the folder", path):
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            return
        sync_folder(path.parent)


def sha256_file(path: Path) -> str:
    """SHA-256 of the file, as hex."""
    with io_errors("read the file", path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def written_file(path: Path) -> Written:
    """Size and SHA-256 of a file that is there."""
    return Written(path.stat().st_size, sha256_file(path))


def sha256_files(paths: Iterable[Path], *, threads: int = 4) -> dict[Path, str]:
    """SHA-256 of many files, side by side (hashing lets go of the interpreter's lock)."""
    paths = list(paths)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(paths, pool.map(sha256_file, paths), strict=True))


def free_bytes(path: Path) -> int:
    """Bytes that may still be written to the disk that holds `path` (or its nearest existing parent)."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(folder).free
