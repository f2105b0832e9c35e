"""Modules that are imported late: torch, so that settings, recipes and help need none of it (over a second)."""

import importlib.util
import logging
import sys
from types import ModuleType


def lazy_module(name: str) -> ModuleType:
    """Return module `name`, imported on first attribute access. Costs nothing if it is never used."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def quiet_bitsandbytes() -> None:
    """To be called before its import, which warns of a kernel that is missing and not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
