"""What torch.compile needs of a machine: a compiler with Python's headers, and a folder for what it makes."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from compress.core.compiling import triton_installed
from compress.core.errors import EnvironmentRefused

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
def use_own_folder() -> None:
    """Let this process keep what it makes in a folder of its own, removed at its end, unless the environment names one:
    torch's choice below /tmp is one that anybody could make first, and it loads pickles from there; and what a process
    that was killed had half linked would be taken for whole."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(_FOLDER, default_cache_dir()) == default_cache_dir():  # torch writes it there when first asked
        os.environ[_FOLDER] = _for_this_process().name


@cache
def _for_this_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="compress-")
