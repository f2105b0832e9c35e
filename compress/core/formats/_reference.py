"""A second decoder, in numpy alone, for verify: slow, plain, and sharing no code with the formats it checks.

It goes from the bytes in the file to fp32 weights by spreading every word into single bits. Layouts: see
compressed_tensors.py and gptq.py. O output channels, K input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import Scheme

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<u4", "I16": "<i2", "I8": "<i1",
    "U8": "<u1",
}  # fmt: skip

Array = np.ndarray


def load(info: TensorInfo) -> Array:
    """The tensor as numpy sees it in the file (mapped, read-only); BF16 as its 16-bit patterns, I32 unsigned."""
    if info.bytes == 0:
        return np.zeros(info.shape, _DTYPES[info.dtype])
    return np.memmap(info.file, _DTYPES[info.dtype], "r", offset=info.start, shape=info.shape)


def floats(values: Array, dtype: str) -> Array:
    """fp32 of what `load` gave for a float tensor of this dtype."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def bits_to_numbers(words_RW: Array, bits: int, count: int) -> Array:
    """Rows of 32-bit words, each one stream, least significant bit first -> their first `count` numbers [R, count]."""
    octets = np.ascontiguousarray(words_RW).astype("<u4").view(np.uint8).reshape(words_RW.shape[0], -1)
    stream = np.unpackbits(octets, axis=1, count=count * bits, bitorder="little")
    return stream.reshape(-1, count, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))


def compressed_tensors(module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, rows: Array) -> Array:
    """fp32 weights [len(rows), K] of the chosen output channels of a pack-quantized or int-quantized module."""
    scale_info = tensors[f"{module}.weight_scale"]
    scale = floats(load(scale_info)[rows], scale_info.dtype)
    half = 1 << (scheme.bits - 1)
    packed = tensors.get(f"{module}.weight_packed")
    if packed is None:
        code = load(tensors[f"{module}.weight"])[rows].astype(np.int32)
    else:
        width = int(load(tensors[f"{module}.weight_shape"])[1])
        code = bits_to_numbers(load(packed)[rows], scheme.bits, width) - half
    group = group_of(code.shape[1], scheme)
    if not scheme.symmetric:
        zero_info = tensors[f"{module}.weight_zero_point"]
        stored = load(zero_info)
        if packed is None:
            zero = stored[rows].astype(np.int32)
        else:
            zero = bits_to_numbers(stored.T, scheme.bits, scale_info.shape[0]).T[rows] - half
        code = code - zero[:, group]
    return code.astype(np.float32) * scale[:, group]


def gptq(module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, rows: Array, version: int) -> Array:
    """fp32 weights [len(rows), K] of the chosen output channels of a GPTQ module, activation order undone."""
    qweight, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"]
    width = qweight.shape[0] * 32 // scheme.bits
    code = bits_to_numbers(load(qweight)[:, rows].T, scheme.bits, width)
    zero = bits_to_numbers(load(tensors[f"{module}.qzeros"]), scheme.bits, qweight.shape[1])[:, rows].T
    if version == 1:
        zero = zero + 1
    order = tensors.get(f"{module}.g_idx")
    group = group_of(width, scheme) if order is None else np.asarray(load(order)).astype(np.int64)
    scale = floats(load(scales)[:, rows].T, scales.dtype)
    return (code - zero[:, group]).astype(np.float32) * scale[:, group]


def group_of(width: int, scheme: Scheme) -> Array:
    """The group of each input channel."""
    return np.zeros(width, np.int64) if scheme.group_size == -1 else np.arange(width) // scheme.group_size
