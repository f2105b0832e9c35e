"""What glibc does with freed memory: kept for the next tensor while a block is worked on, given back between blocks."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 256 << 20
_SMALLEST_RETURNED_BYTES = 1 << 20
_LARGEST_KEPT_BYTES = 32 << 20  # glibc allows no more


def reuse_freed_memory() -> None:
    """Let freed memory serve the next allocation. By default glibc returns a tensor's pages at once, and the next
    one's are zeroed anew: a tenth of a walk's time. `trim_memory` gives back what has piled up."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Let freed tensors leave the process at once. Where whole tensors come and go between parts that stay, glibc's
    heap would end as large as everything that was ever gathered."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 8 * _SMALLEST_RETURNED_BYTES)


def trim_memory() -> None:
    """Give freed memory back to the system (glibc keeps it otherwise), so that the peak is what is really in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
