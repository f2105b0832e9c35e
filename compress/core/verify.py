"""verify: is this folder a whole, sound model, is it what its source became, and did the runtime agree?

integrity   any folder, other tools' too: names, manifest hashes, headers, index, shapes, quantized layers, finite
            values, an independent second decoder, and on demand the format's own library
coverage    also every source tensor quantized, kept or dropped with a reason; needs a manifest or the source
parity      also the record that the runtime agreed with the reference

Nothing in the folder is executed, and nothing in it makes verify raise: what is wrong becomes a failed check that names
file and field. Files are mapped, shard by shard, so memory stays bounded.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core import _verify_folder as folders
from compress.core._verify_gguf import gguf_file
from compress.core._verify_kv_cache import check_kv_cache, speaks_of_cache
from compress.core._verify_report import LEVELS, Check, Level, VerifyReport
from compress.core.errors import ArtifactError, CompressError, InputError, UsageError
from compress.core.formats import NotRead, Reader, method_of, reader_for
from compress.core.manifest import MANIFEST_NAME, Manifest
from compress.core.places import locate

if TYPE_CHECKING:
    from compress.core.safetensors_io import TensorInfo
    from compress.core.scheme import Scheme

__all__ = ["Check", "Level", "VerifyReport", "verify"]


def verify(
    folder: str | Path,
    *,
    source: str | Path | None = None,
    level: Level | None = None,
    library: bool = False,
    threads: int | None = None,
) -> VerifyReport:
    """Check a model folder. `level` defaults to coverage where a manifest or `source` is there, else integrity.
    `source` is a folder, or `demo`. `library` has the format's own library read some layers, too: a run and an upload
    ask for it; importing the library takes far longer than all else.

    Raises UsageError for a folder that does not exist or an unknown level, nothing else.
    """
    path = Path(folder)
    if path.is_file():
        raise UsageError("this is a file: name the folder of an artifact", where=str(folder))
    if not path.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    if source is not None:
        source = locate(str(source), "model", Path())
    if source is not None and not Path(source).is_dir():
        raise UsageError("there is no such folder", where=str(source))
    if level is not None and level not in LEVELS:
        raise UsageError(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    has_reference = source is not None or (path / MANIFEST_NAME).exists()
    depth: Level = level or ("coverage" if has_reference else "integrity")
    run = _Run(path, depth, library, threads or min(4, os.cpu_count() or 1))
    run.integrity()
    if run.report.level != "integrity":
        run.coverage(None if source is None else Path(source))
    if run.report.level == "parity":
        run.parity()
    elif run.contents.manifest is not None and run.gguf is None and run.contents.manifest.parity is None:
        run.report.notices.append(
            "parity: there is no record of a comparison with our runtime; scoring through it makes one"
        )
    return run.report


class _Run:
    """One verification: what was read so far, and the report. A check that needs what failed before is left out."""

    def __init__(self, folder: Path, level: Level, library: bool, threads: int) -> None:
        self.report = VerifyReport(folder, level)
        self.contents = folders.Contents(folder)
        self.gguf = gguf_file(folder)
        self.asks_library = library
        self.threads = threads
        self.reader: Reader | None = None
        self.schemes: dict[str, Scheme] = {}

    def check(self, name: str, look: Callable[[], str]) -> bool:
        """Run one check; what is wrong becomes its detail."""
        started = time.monotonic()
        try:
            ok, detail = True, look()
        except NotRead as error:
            self.report.notices.append(f"{name}: not checked: {error}")
            return False
        except CompressError as error:
            ok, detail = False, str(error)
        except (OSError, OverflowError, RecursionError, MemoryError) as error:
            ok, detail = False, f"{self.report.folder}: cannot be read: {error}"
        self.report.checks.append(Check(name, ok, detail, time.monotonic() - started))
        return ok

    # ------------------------------------------------------------------ integrity
    def integrity(self) -> None:
        contents = self.contents
        self.check("names", lambda: folders.check_names(contents.folder))
        self.check("manifest", self._manifest)
        if self.gguf is not None:
            self._gguf(self.gguf)
            return
        has_config = self.check("config", self._config)
        if not self.check("headers", lambda: folders.read_weights(contents)):
            self._hashes_alone()
            return
        self.report.bytes = contents.bytes
        self.check("index", lambda: folders.check_index(contents))
        if not has_config:
            self._hashes_alone()
            return
        readable = method_of(contents.config) is None or self.check("quantization", self._quantization)
        if speaks_of_cache(contents):
            self.check("kv_cache", lambda: check_kv_cache(contents))
        fits = readable and self.check("layers", self._layers)
        if fits:
            self.check("shapes", self._shapes)
        self.check("contents", lambda: self._shards(decode=fits))
        if fits and self.reader is not None and self.report.ok:
            self._library()

    def _gguf(self, path: Path) -> None:
        from compress.core._verify_gguf import check_gguf

        self.report.bytes = path.stat().st_size
        self.check("gguf", lambda: check_gguf(path))
        self.check("contents", lambda: self._shards(decode=False))

    def _manifest(self) -> str:
        self.contents.manifest = folders.read_manifest(self.contents.folder)
        if self.contents.manifest is None:
            self.report.notices.append(f"no {MANIFEST_NAME}: hashes, lineage and coverage are unknown")
            return "none"
        return folders.check_listing(self.contents, self.contents.manifest)

    def _config(self) -> str:
        self.contents.config = folders.read_json(self.contents.folder / "config.json")
        method = method_of(self.contents.config)
        return f"{self.contents.config.get('model_type')}, {'not quantized' if method is None else method}"

    def _quantization(self) -> str:
        reader = reader_for(self.contents.config)
        self.schemes = reader.modules(self.contents.tensors)
        if not self.schemes:
            raise ArtifactError("names a method, but no layer is quantized", where="config.json: quantization_config")
        self.reader = reader
        kinds = sorted({scheme.name for scheme in self.schemes.values()})
        return f"{reader.method}: {len(self.schemes)} layers as {', '.join(kinds)}"

    def _layers(self) -> str:
        from compress.core._verify_weights import check_parts

        if self.reader is None:
            return "not quantized"
        return check_parts(self.contents, self.reader, self.schemes)

    def _shapes(self) -> str:
        from compress.core._verify_shapes import check_shapes

        return check_shapes(self.contents, self.schemes, self.reader)

    def _shards(self, *, decode: bool) -> str:
        """Hashes on one thread, finite values and the second decoder on another, shard by shard."""
        modules = self._modules_by_shard() if decode else {}
        tensors: dict[Path, list[TensorInfo]] = {}
        for info in self.contents.tensors.values():
            tensors.setdefault(info.file, []).append(info)
        listed = self._listed_files()
        hashing: dict[str, Future[str]] = {}
        reading: list[Future[None]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            for path in dict.fromkeys([*self.contents.shards, *listed.values()]):
                name = path.relative_to(self.contents.folder).as_posix()
                if name in listed:
                    hashing[name] = pool.submit(_sha256, path)
                if path in tensors:
                    reading.append(pool.submit(self._values, tensors[path], modules.get(path, [])))
        self._require_hashes({name: future.result() for name, future in hashing.items()})
        for future in reading:
            future.result()
        hashed = f"{len(hashing)} files have their SHA-256; " if hashing else ""
        decoded = f"; {sum(map(len, modules.values()))} layers read alike by two decoders" if modules else ""
        return f"{hashed}all values finite{decoded}"

    def _hashes_alone(self) -> None:
        """What cannot be read is not looked into, but every damaged file is named all the same."""
        if listed := self._listed_files():
            self.check("contents", lambda: self._hashes(listed))

    def _hashes(self, listed: Mapping[str, Path]) -> str:
        with ThreadPoolExecutor(self.threads) as pool:
            self._require_hashes(dict(zip(listed, pool.map(_sha256, listed.values()), strict=True)))
        return f"{len(listed)} files have their SHA-256"

    def _listed_files(self) -> dict[str, Path]:
        """Those of the manifest that are there, by name."""
        if self.contents.manifest is None:
            return {}
        paths = {file.path: self.contents.folder / file.path for file in self.contents.manifest.files}
        return {name: path for name, path in paths.items() if path.is_file()}

    def _require_hashes(self, found: Mapping[str, str]) -> None:
        listed = () if self.contents.manifest is None else self.contents.manifest.files
        wanted = {file.path: file.sha256 for file in listed}
        damaged = [name for name, digest in found.items() if digest != wanted[name]]
        if len(damaged) > 1:
            raise ArtifactError("do not have the SHA-256 that the manifest says", where=", ".join(damaged))
        for name in damaged:
            said = f"its SHA-256 is {found[name][:12]}…, the manifest says {wanted[name][:12]}…"
            raise ArtifactError(said, where=name)

    def _values(self, infos: list[TensorInfo], modules: list[str]) -> None:
        """One shard: all its tensors, and the modules that begin in it."""
        from compress.core._verify_weights import check_module, check_values
        from compress.core.safetensors_io import MappedFiles

        files = MappedFiles()
        for info in infos:
            check_values(info.name, info, files)
        for module in modules:
            if self.reader is not None:
                check_module(self.reader, module, self.schemes[module], self.contents.tensors, files)

    def _modules_by_shard(self) -> dict[Path, list[str]]:
        found: dict[Path, list[str]] = {}
        tensors: Mapping[str, TensorInfo] = self.contents.tensors
        for module, scheme in self.schemes.items():
            if self.reader is not None:
                found.setdefault(tensors[self.reader.stored_names(module, scheme)[0]].file, []).append(module)
        return found

    def _library(self) -> None:
        from compress.core._verify_bitsandbytes import check_bitsandbytes
        from compress.core._verify_weights import check_library, library_version

        checks = {"compressed-tensors": check_library, "bitsandbytes": check_bitsandbytes}
        reader = self.reader
        if reader is None or reader.method not in checks:
            return
        name = reader.method
        if library_version(name) is None:
            self.report.notices.append(f"{name} is not installed: not read by the format's own library")
            return
        if not self.asks_library:
            self.report.notices.append(f"library: not asked; --library has {name} read four layers, too")
            return
        self.check("library", lambda: checks[name](reader, self.schemes, self.contents.tensors))

    # ------------------------------------------------------------------ coverage and parity
    def coverage(self, source_folder: Path | None) -> None:
        from compress.core import _verify_coverage as covers
        from compress.core._verify_weights import quantized_names

        contents, reader = self.contents, self.reader
        if self.gguf is not None:
            self.report.notices.append("coverage: not compared: a gguf file names tensors in its own way")
            return
        if not contents.tensors or not self.report.ok:
            self.report.notices.append("coverage: not checked, since the folder itself is not sound")
            return
        if reader is None and method_of(contents.config) is not None:
            self.report.notices.append("coverage: not checked, since the quantized layers are not read")
            return
        source: folders.Contents | None = None
        if source_folder is not None:
            opened: list[folders.Contents] = []
            if not self.check("source", lambda: _opened(source_folder, opened)):
                return
            source = opened[0]
        stored = set() if reader is None else set(quantized_names(reader, self.schemes))
        manifest: Manifest | None = contents.manifest
        covered = self.check(
            "coverage", lambda: covers.check_coverage(contents, manifest, source, self.schemes, stored)
        )
        if source is None or not covered:
            return
        origin = source
        if manifest is not None:
            self.check("lineage", lambda: covers.check_lineage(manifest, origin))
        self.check("kept", lambda: covers.check_kept(contents, origin, stored | covers.transformed(manifest)))
        if reader is not None:
            changed = covers.transformed(manifest)
            schemes = {name: scheme for name, scheme in self.schemes.items() if f"{name}.weight" not in changed}
            self.check("closeness", lambda: covers.check_closeness(contents, origin, reader, schemes))

    def parity(self) -> None:
        manifest = self.contents.manifest
        record = None if manifest is None else manifest.parity
        if manifest is None and (self.report.folder / MANIFEST_NAME).exists():
            self.report.notices.append("parity: not checked, since the manifest is not sound")
            return
        if manifest is None:
            self.report.notices.append("parity: the folder has no manifest to hold a record of the runtime's agreement")
            return
        self.check("parity", lambda: _parity(record))


def _opened(folder: Path, opened: list[folders.Contents]) -> str:
    from compress.core._verify_coverage import open_source

    opened.append(open_source(folder))
    return f"{len(opened[0].tensors)} tensors in {folder.name}"


def _sha256(path: Path) -> str:
    """Mapped and hashed in one call, which lets go of the interpreter's lock for as long as it takes."""
    from compress.core.safetensors_io import MappedFiles

    return hashlib.sha256(MappedFiles().whole(path) if path.stat().st_size else b"").hexdigest()


def _parity(record: Mapping[str, Any] | None) -> str:
    where = f"{MANIFEST_NAME}: parity"
    match record:
        case {
            "exact_to_transformers": {"largest_logprob_difference": float(found)},
            "bounds": {"logprob": float(bound)},
            "passed": bool(passed),
        }:
            said = f"log-probabilities within {found:.1e}"
        case {"exact_to_transformers": {"kl": float(found)}, "bounds": {"kl": float(bound)}, "passed": bool(passed)}:
            said = f"KL divergence {found:.1e}, with inputs rounded by both"
        case None:
            raise ArtifactError("the artifact was not scored through the runtime: there is no record", where=where)
        case _:
            raise ArtifactError("is not a comparison with the runtime", where=where)
    if not passed or not found <= bound:
        raise InputError("the recorded comparison with the runtime did not pass", where=where)
    return f"the runtime agreed with transformers: {said} (bound {bound:g})"
