"""C kernels for low-bit weights on CPUs, compiled by the machine's own gcc when the first layer asks for them.

torch's packed kernels want bf16 inputs, which only some CPUs are good at, know few schemes, and lose to dense weights
from a dozen rows on. These read a QuantTensor as it lies, for every scheme. One file of plain C takes about a second to
compile; it is loaded from a temporary folder and nothing is kept on disk. Where it cannot be compiled, `reason` says
why, and layers go through torch's kernels.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

KINDS = {"int": 0, "nf4": 1, "fp4": 1, "fp8": 2}
_SOURCE = Path(__file__).with_name("low_bit.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_TIMEOUT_S = 120
_SERIAL_BYTES = 1 << 16  # smaller weights are not worth waking a second thread


class Weight(ctypes.Structure):
    """The struct of the same name in low_bit.c; pointers are plain numbers, so that it can be copied."""

    _fields_ = [
        ("codes", ctypes.c_size_t),
        ("scale", ctypes.c_size_t),
        ("zero", ctypes.c_size_t),
        ("table", ctypes.c_size_t),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_bytes", ctypes.c_int64),
        ("middle", ctypes.c_float),
        ("bits", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels, or None and the reason."""

    library: ctypes.CDLL | None
    reason: str = ""

    def product(self, weight: Weight, x_MK: Tensor) -> Tensor:
        """x Wᵀ, fp32 [M, O], of fp32 x [M, K]."""
        if self.library is None:
            raise RuntimeError(self.reason)
        x_MK = x_MK.contiguous()
        y_MO = torch.empty((len(x_MK), weight.rows), dtype=torch.float32)
        at = ctypes.byref(weight)
        if self.library.low_bit_product(at, len(x_MK), x_MK.data_ptr(), y_MO.data_ptr(), _threads(weight, weight.rows)):
            raise MemoryError(f"no memory for {len(x_MK)} rows of inputs")
        return y_MO

    def dequantize(self, weight: Weight, first: int, last: int, to: Tensor) -> None:
        """Output channels `first` up to `last` into fp32 `to` [last - first, places in a byte, bytes of a channel]."""
        if self.library is None:
            raise RuntimeError(self.reason)
        threads = _threads(weight, last - first)
        self.library.low_bit_dequantize(ctypes.byref(weight), first, last, to.data_ptr(), threads)


def _threads(weight: Weight, rows: int) -> int:
    return 1 if rows * weight.row_bytes < _SERIAL_BYTES else torch.get_num_threads()


@cache
def kernels() -> Kernels:
    """Compile and load, once in a process."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return Kernels(None, "there is no C compiler")
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not openmp:  # a second OpenMP runtime would fight torch's threads for the cores
        return Kernels(None, "torch brings no GNU OpenMP library whose threads could be shared")
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        compiled, library = Path(folder, "low_bit.o"), Path(folder, "low_bit.so")
        steps = ([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],)
        steps += ([compiler, "-shared", str(compiled), str(openmp[0]), "-o", str(library)],)
        for step in steps:
            failure = _failure(step)
            if failure:
                return Kernels(None, failure)
        try:
            return Kernels(_typed(ctypes.CDLL(str(library))))
        except OSError as error:
            return Kernels(None, f"the compiled kernels cannot be loaded: {error}")


def _failure(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    return "" if done.returncode == 0 else f"{command[0]} fails: {done.stderr.strip()[:200]}"


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.low_bit_product.argtypes = [ctypes.POINTER(Weight), integer, pointer, pointer, number]
    library.low_bit_product.restype = number
    library.low_bit_dequantize.argtypes = [ctypes.POINTER(Weight), integer, integer, pointer, number]
    library.low_bit_dequantize.restype = None
    return library
