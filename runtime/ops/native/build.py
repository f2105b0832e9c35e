"""C files of the runtime, compiled by the machine's own compiler when they are first asked for.

A file of plain C takes under a second; the library is loaded from a temporary folder and nothing stays on disk. The
threads are those of torch's OpenMP, so that there are never more of them than cores.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Library:
    """A loaded library, or None and the reason."""

    loaded: ctypes.CDLL | None
    reason: str = ""


def build(sources: Sequence[Path]) -> Library:
    """Compile C files into one library and load it."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return Library(None, "there is no C compiler")
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not openmp:  # a second OpenMP runtime would fight torch's threads for the cores
        return Library(None, "torch brings no GNU OpenMP library whose threads could be shared")
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        compiled, library = [str(Path(folder, f"{source.stem}.o")) for source in sources], Path(folder, "kernels.so")
        steps = [
            [compiler, *_FLAGS, "-c", str(source), "-o", target]
            for source, target in zip(sources, compiled, strict=True)
        ]
        for step in [*steps, [compiler, "-shared", *compiled, str(openmp[0]), "-lm", "-o", str(library)]]:
            failure = _failure(step)
            if failure:
                return Library(None, failure)
        try:
            return Library(ctypes.CDLL(str(library)))
        except OSError as error:
            return Library(None, f"the compiled kernels cannot be loaded: {error}")


def _failure(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    return "" if done.returncode == 0 else f"{command[0]} fails: {done.stderr.strip()[:200]}"
