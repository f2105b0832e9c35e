"""What `compress doctor` looks at: our packages, versions, devices, memory, disk, where downloads are kept."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from compress.core.errors import EnvironmentRefused
from compress.core.methods import PACKAGES, available_kinds, package_folder
from compress.core.quantities import format_bytes

_LIBRARIES = ("torch", "transformers", "safetensors", "lm_eval", "huggingface_hub", "numpy")
_LITTLE_MEMORY = 2 << 30
_LITTLE_DISK = 5 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `needed`: without it nothing works; `hint`: how to put it right."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    needed: bool = False


def examine(folder: Path | None = None) -> list[Finding]:
    """All findings for this machine; `folder` is where artifacts would be written (default: the current one)."""
    return [*_packages(), *_versions(), *_devices(), _memory(), _disk(folder or Path.cwd()), _downloads()]


def _packages() -> Iterator[Finding]:
    import compress

    yield Finding("compress", True, f"{compress.__version__} in {Path(compress.__path__[0]).resolve()}")
    for package in PACKAGES:
        try:
            package_folder(package)
        except EnvironmentRefused as error:
            yield Finding(f"package {package}", False, error.message, error.hint or "reinstall", needed=True)
    methods = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in available_kinds().items())
    yield Finding("methods", bool(methods), methods or "none", "reinstall compress-llm", needed=True)


def _versions() -> Iterator[Finding]:
    yield Finding(
        "python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer", needed=True
    )
    for library in _LIBRARIES:
        try:
            yield Finding(library, True, metadata.version(library))
        except metadata.PackageNotFoundError:
            yield Finding(library, False, "not installed", f"pip install {library}", needed=True)


def _devices() -> Iterator[Finding]:
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("cpu", True, threads)
    if not torch.cuda.is_available():
        build = "a CPU build of torch" if torch.version.cuda is None else "no driver or no device"
        yield Finding("gpu", True, f"none ({build}); everything runs on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"cuda:{number}", True, f"{name}, {format_bytes(free)} of {format_bytes(total)} free")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.available >= _LITTLE_MEMORY
    detail = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} available"
    return Finding("memory", enough, detail, "close other programs: models of 1 B parameters need about 2 GB")


def _disk(folder: Path) -> Finding:
    import psutil

    free = psutil.disk_usage(str(folder)).free
    writable = os.access(folder, os.W_OK)
    detail = f"{format_bytes(free)} free in {folder}{'' if writable else ', which is not writable'}"
    return Finding("disk", free >= _LITTLE_DISK and writable, detail, "choose --output on another disk")


def _downloads() -> Finding:
    from huggingface_hub import constants

    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    return Finding("downloads", True, f"kept in {constants.HF_HUB_CACHE}{offline}")
