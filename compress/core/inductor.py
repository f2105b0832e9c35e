"""What torch.compile needs of a machine: a compiler with Python's headers, and a folder for what it makes."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from compress.core.compiling import private_cache, triton_installed
from compress.core.errors import EnvironmentRefused
from compress.core.files import make_folder

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def require_inductor(device: str) -> None:
    """EnvironmentRefused, with what is missing, where torch.compile cannot make kernels for this device."""
    on_gpu = not device.startswith("cpu")
    compiler = os.environ.get("CC" if on_gpu else "CXX") or ("gcc" if on_gpu else "g++")
    if on_gpu and not triton_installed():
        raise EnvironmentRefused("torch.compile needs Triton for a GPU, and it is not installed", hint="compile: false")
    if shutil.which(compiler) is None:
        raise EnvironmentRefused(f"torch.compile needs a compiler, and {compiler} is not here", hint="compile: false")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        hint = "install the headers of this Python (python3-dev, python3-devel), or compile: false"
        raise EnvironmentRefused("torch.compile needs Python.h, which is not here", where=str(header), hint=hint)


@cache
def use_private_folder() -> None:
    """Let it keep what it makes where nobody else can write, unless the environment names a folder: it loads pickles
    from there, and its own choice below /tmp is one that anybody could make first."""
    if _FOLDER in os.environ:
        return
    kept = private_cache()
    os.environ[_FOLDER] = str(make_folder(kept / "inductor")) if kept else _for_this_process().name


@cache
def _for_this_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="compress-")
