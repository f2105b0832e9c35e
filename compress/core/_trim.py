"""Giving memory back to the system."""

import ctypes


def trim_memory() -> None:
    """Give freed memory back to the system (glibc keeps it otherwise), so that the peak is what is really in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
