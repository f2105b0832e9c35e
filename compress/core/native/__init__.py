"""C kernels of the solvers for CPUs: what is not a matrix product and would be hundreds of small operations in torch.

Each has a twin in torch beside the caller, which is used on other devices and where there is no compiler: the same
maths, summed in another order. `identity()` says which of the two decides an artifact's bits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress.core.compiling import digest, load, threads_for
from compress.core.errors import CompressError

_POINTER, _INTEGER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


class _Sweep(ctypes.Structure):
    """The struct of sweep.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("target", "original", "feedback", "scale", "zero", "group", "channel", "cost")),
        *((name, _POINTER) for name in ("error", "codes", "loss")),
        ("columns", _INTEGER),
        ("rows", _INTEGER),
        ("lowest", _FLOAT),
        ("highest", _FLOAT),
        ("floats", _INT),
        ("keep_zeros", _INT),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Compiled, or taken from the cache, and loaded: once in a process. None where that cannot be done."""
    try:
        loaded = load(Path(__file__).parent)
    except CompressError:
        return None
    loaded.sweep_block.argtypes = [ctypes.POINTER(_Sweep), _INT]
    loaded.sweep_block.restype = _INT
    loaded.rounding_error.argtypes = [*[_POINTER] * 5, *[_INTEGER] * 3, _FLOAT, _FLOAT, _INT, _INT]
    loaded.rounding_error.restype = None
    loaded.level_error.argtypes = [*[_POINTER] * 5, *[_INTEGER] * 3, _INT, _INT]
    loaded.level_error.restype = None
    return loaded


def serves(tensor: Tensor) -> bool:
    """Whether the kernels are there for what lies where this tensor does."""
    return tensor.device.type == "cpu" and library() is not None


def identity() -> str:
    """A digest of sources, compiler and instruction set; "torch" where there are no kernels."""
    return "torch" if library() is None else _digest()


@cache
def _digest() -> str:
    return digest(Path(__file__).parent)


def sweep_block(
    *,
    target_BR: Tensor,
    original_BR: Tensor,
    feedback_BB: Tensor,
    scale_GR: Tensor,
    zero_GR: Tensor | None,
    group_B: Tensor,
    channel_B: Tensor,
    cost_B: Tensor,
    levels: tuple[int, int] | None,
    error_BR: Tensor,
    codes_KR: Tensor,
    loss_R: Tensor,
    keep_zeros: bool,
) -> None:
    """Round the columns of one block, last to first (see sweep.c); fills error_BR, rows of codes_KR, adds to loss_R.

    All contiguous: fp32, indices int64, codes int8. levels: the lowest and the highest code; None: 4-bit floats.
    keep_zeros: columns whose original is zero become zero, and later ones make up for what they would have taken on.
    """
    sweep = _Sweep(
        *(each.data_ptr() for each in (target_BR, original_BR, feedback_BB, scale_GR)),
        None if zero_GR is None else zero_GR.data_ptr(),
        *(each.data_ptr() for each in (group_B, channel_B, cost_B, error_BR, codes_KR, loss_R)),
        *target_BR.shape,
        *(levels or (0, 0)),
        levels is None,
        keep_zeros,
    )
    if _loaded().sweep_block(ctypes.byref(sweep), threads_for(target_BR.numel())):
        raise MemoryError("no memory for the errors of one block of columns")


def rounding_error(
    weight_OGS: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    importance_GS: Tensor | None,
    levels: tuple[int, int],
    cubed: bool,
) -> Tensor:
    """Squared (or cubed) rounding error of every group, fp32 [O, G]; all inputs fp32 and contiguous."""
    error_OG = torch.empty_like(scale_OG)
    _loaded().rounding_error(
        weight_OGS.data_ptr(),
        None if importance_GS is None else importance_GS.data_ptr(),
        scale_OG.data_ptr(),
        None if zero_OG is None else zero_OG.data_ptr(),
        error_OG.data_ptr(),
        *weight_OGS.shape,
        *levels,
        cubed,
        threads_for(weight_OGS.numel()),
    )
    return error_OG


def level_error(
    weight_OGS: Tensor, scale_OG: Tensor, importance_GS: Tensor | None, levels: Tensor, cubed: bool
) -> Tensor:
    """The same for 16 levels, fp32 and ascending, that are scaled; all inputs fp32 and contiguous."""
    error_OG = torch.empty_like(scale_OG)
    _loaded().level_error(
        weight_OGS.data_ptr(),
        None if importance_GS is None else importance_GS.data_ptr(),
        scale_OG.data_ptr(),
        levels.data_ptr(),
        error_OG.data_ptr(),
        *weight_OGS.shape,
        cubed,
        threads_for(weight_OGS.numel()),
    )
    return error_OG


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the kernels are not there: ask library() first")
    return loaded
