"""What the bytes of a GGUF tensor mean, in numpy alone: shares no code with the writer, which it checks.

Layouts as in `_gguf_blocks`. Values are computed in fp32, as ggml does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.core.errors import ArtifactError
from compress.core.formats._gguf_container import Stored

Array = np.ndarray


def values(path: Path, tensor: Stored) -> Array:
    """fp32 values of a tensor, in its shape."""
    octets = np.memmap(path, np.uint8, "r", tensor.start, (tensor.bytes,))
    return decode(octets, tensor.type.name).reshape(tensor.shape)


def readable(type: str) -> bool:
    """Whether values of a type can be read."""
    return type in _DECODERS


def decode(octets: Array, type: str) -> Array:
    """fp32 values of whole blocks of a type."""
    if type not in _DECODERS:
        raise ArtifactError(f"values of type {type} are not read")
    return _DECODERS[type](octets)


def _half(octets: Array) -> Array:
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)


def _bf16(octets: Array) -> Array:
    return (octets.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(octets: Array) -> Array:
    block = octets.reshape(-1, 18)
    codes = np.concatenate([block[:, 2:] & 15, block[:, 2:] >> 4], axis=1).astype(np.int32) - 8
    return (codes.astype(np.float32) * _half(block[:, :2])).reshape(-1)


def _q8_0(octets: Array) -> Array:
    block = octets.reshape(-1, 34)
    return (block[:, 2:].view(np.int8).astype(np.float32) * _half(block[:, :2])).reshape(-1)


def _q4_k(octets: Array) -> Array:
    block = octets.reshape(-1, 144)
    d, m, packed = _half(block[:, :2]), _half(block[:, 2:4]), block[:, 4:16].astype(np.int32)
    scale = np.concatenate([packed[:, :4] & 63, packed[:, 8:] & 15 | packed[:, :4] >> 6 << 4], axis=1)
    low = np.concatenate([packed[:, 4:8] & 63, packed[:, 8:] >> 4 | packed[:, 4:8] >> 6 << 4], axis=1)
    codes = np.stack([block[:, 16:].reshape(-1, 4, 32) & 15, block[:, 16:].reshape(-1, 4, 32) >> 4], axis=2)
    unit, taken = (d * scale.astype(np.float32))[..., None], (m * low.astype(np.float32))[..., None]
    return (unit * codes.reshape(-1, 8, 32).astype(np.float32) - taken).reshape(-1)


def _q6_k(octets: Array) -> Array:
    block = octets.reshape(-1, 210)
    low, high = block[:, :128].reshape(-1, 2, 2, 32), block[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = (nibbles | (high >> shifts & 3) << 4).astype(np.int32) - 32
    unit = _half(block[:, 208:]) * block[:, 192:208].view(np.int8).astype(np.float32)
    return (unit[..., None] * codes.reshape(-1, 16, 16).astype(np.float32)).reshape(-1)


_DECODERS = {
    "f32": lambda octets: octets.view("<f4"),
    "f16": _half,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}
