"""Compiling C kernels with the machine's gcc, and keeping the result in the user's cache; whether Triton is there.

The cache is a folder that only its owner can write to; a file's name is a digest of everything that it is made from, so
that a new source, compiler, torch or CPU makes a new one. Without such a folder the kernels are compiled each time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from compress.core.errors import CompressError, EnvironmentRefused
from compress.core.files import link_or_copy, make_folder

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_TIMEOUT_S = 120
_OURS_ALONE = 0o700
_SERIAL_WORK = 1 << 16  # work that is not worth waking a second thread


@cache
def triton_installed() -> bool:
    """Whether kernels for a GPU can be had; imports nothing."""
    return find_spec("triton") is not None


def load(folder: Path) -> ctypes.CDLL:
    """All C files of a folder as one library, from the cache or compiled now. EnvironmentRefused: what is missing."""
    compiler, openmp = _tools()
    cache = _cache_folder()
    kept = None if cache is None else cache / f"kernels-{digest(folder)}.so"
    if kept is not None and kept.is_file():
        return _opened(kept)
    with tempfile.TemporaryDirectory(prefix="compress-", dir=cache) as work:
        made = _compile(compiler, openmp, sorted(folder.glob("*.c")), Path(work, "kernels.so"))
        if kept is not None and not kept.is_file():
            with suppress(CompressError):  # another process was first, or the disk is full: what was made still loads
                link_or_copy(made, kept)
        return _opened(made)


def digest(folder: Path) -> str:
    """Of everything that a folder's library is made from. EnvironmentRefused: what is missing to make it."""
    compiler, openmp = _tools()
    parts = [
        _version(compiler),
        _instructions(),
        platform.machine().encode(),
        str(openmp).encode(),
        repr(_FLAGS).encode(),
    ]
    parts += [file.read_bytes() for suffix in ("h", "c") for file in sorted(folder.glob(f"*.{suffix}"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def threads_for(work: int) -> int:
    """Threads for an operation that reads so many numbers, or bytes of packed ones."""
    return 1 if work < _SERIAL_WORK else torch.get_num_threads()


def _tools() -> tuple[str, Path]:
    """The compiler and the OpenMP library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise EnvironmentRefused("there is no C compiler")
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not openmp:  # a second OpenMP runtime would fight torch's threads for the cores
        raise EnvironmentRefused("torch brings no GNU OpenMP library whose threads could be shared")
    return compiler, openmp[0]


@cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False).stdout


def _instructions() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return platform.processor().encode()


def _opened(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise EnvironmentRefused(f"the compiled kernels cannot be loaded: {error}") from None


def _cache_folder() -> Path | None:
    """A folder below the user's cache that nobody else can write to, None if it cannot be made."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = make_folder(base / "compress")
        if folder.stat().st_uid != os.getuid():
            return None
        folder.chmod(_OURS_ALONE)
    except (CompressError, OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return folder


def _compile(compiler: str, openmp: Path, sources: Sequence[Path], library: Path) -> Path:
    objects = {source: str(library.with_name(f"{source.stem}.o")) for source in sources}
    _run([[compiler, *_FLAGS, "-c", str(source), "-o", made] for source, made in objects.items()])
    _run([[compiler, "-shared", *objects.values(), str(openmp), "-lm", "-o", str(library)]])
    return library


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side; EnvironmentRefused with what the first that fails says."""
    try:
        running = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for each in commands]
        said = [each.communicate(timeout=_TIMEOUT_S)[0].decode(errors="replace") for each in running]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentRefused(f"{commands[0][0]} does not run: {error}") from None
    for process, text in zip(running, said, strict=True):
        if process.returncode:
            raise EnvironmentRefused(f"{commands[0][0]} fails: {text.strip()[:200]}")
