"""A second decoder, in numpy alone, for verify: slow, plain, and sharing no code with the formats it checks.

It goes from the bytes in the file to fp32 weights by spreading every word into single bits. Layouts: see the format's
module. O output channels, K input channels, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np

from compress.core.formats import Reader
from compress.core.safetensors_io import TensorInfo, raw_bytes
from compress.core.scheme import Scheme

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<u4", "I16": "<i2", "I8": "<i1",
    "U8": "<u1", "F8_E4M3": "<u1",
}  # fmt: skip

Array = np.ndarray
Bytes = Callable[[TensorInfo], memoryview]  # a tensor's bytes as they lie in the file


def weights(
    reader: Reader,
    module: str,
    tensors: Mapping[str, TensorInfo],
    scheme: Scheme,
    rows: Array,
    read: Bytes = raw_bytes,
) -> Array:
    """fp32 weights [len(rows), K] of the chosen output channels of a module."""
    if reader.method == "gptq":
        return gptq(module, tensors, scheme, rows, reader.options["version"], read)
    if reader.method == "awq":
        return awq(module, tensors, scheme, rows, read)
    if reader.method == "bitsandbytes":
        decoder = bitsandbytes_int8 if scheme.dtype == "int" else bitsandbytes_4bit
        return decoder(module, tensors, scheme, rows, read)
    return compressed_tensors(module, tensors, scheme, rows, read)


def load(info: TensorInfo, read: Bytes) -> Array:
    """The tensor as numpy sees it in the file (not copied); BF16 as its 16-bit patterns, I32 unsigned."""
    return np.frombuffer(read(info), _DTYPES[info.dtype]).reshape(info.shape)


def floats(values: Array, dtype: str) -> Array:
    """fp32 of what `load` gave for a float tensor of this dtype."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def bits_to_numbers(words_RW: Array, bits: int, count: int) -> Array:
    """Rows of 32-bit words, each one stream, least significant bit first -> their first `count` numbers [R, count]."""
    octets = np.ascontiguousarray(words_RW).astype("<u4").view(np.uint8).reshape(words_RW.shape[0], -1)
    stream = np.unpackbits(octets, axis=1, count=count * bits, bitorder="little")
    numbers = stream[:, 0::bits].copy()
    for bit in range(1, bits):
        numbers |= stream[:, bit::bits] << np.uint8(bit)
    return numbers.astype(np.int32)


def compressed_tensors(
    module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, rows: Array, read: Bytes = raw_bytes
) -> Array:
    """The same for a module of any of the format's kinds."""
    scale_info = tensors[f"{module}.weight_scale"]
    if scheme.dtype in ("mxfp4", "nvfp4"):
        divisor = tensors.get(f"{module}.weight_global_scale")
        whole = None if divisor is None else load(divisor, read).reshape(1)
        return _fp4(load(tensors[f"{module}.weight_packed"], read)[rows], load(scale_info, read)[rows], whole)
    if scheme.dtype == "fp8":
        octets = load(tensors[f"{module}.weight"], read)[rows]
        return _fp8(octets, floats(load(scale_info, read), scale_info.dtype), rows, scheme)
    scale = floats(load(scale_info, read)[rows], scale_info.dtype)
    half = 1 << (scheme.bits - 1)
    packed = tensors.get(f"{module}.weight_packed")
    if packed is None:
        code = load(tensors[f"{module}.weight"], read)[rows].astype(np.int32)
    else:
        width = int(load(tensors[f"{module}.weight_shape"], read)[1])
        code = bits_to_numbers(load(packed, read)[rows], scheme.bits, width) - half
    group = group_of(code.shape[1], scheme)
    if not scheme.symmetric:
        zero_info = tensors[f"{module}.weight_zero_point"]
        stored = load(zero_info, read)
        if packed is None:
            zero = stored[rows].astype(np.int32)
        else:
            zero = bits_to_numbers(stored.T, scheme.bits, scale_info.shape[0]).T[rows] - half
        code = code - zero[:, group]
    return code.astype(np.float32) * scale[:, group]


def input_scale(module: str, tensors: Mapping[str, TensorInfo], read: Bytes = raw_bytes) -> float:
    """The one scale of a module's static inputs."""
    info = tensors[f"{module}.input_scale"]
    return float(floats(load(info, read).reshape(1), info.dtype)[0])


def gptq(
    module: str,
    tensors: Mapping[str, TensorInfo],
    scheme: Scheme,
    rows: Array,
    version: int,
    read: Bytes = raw_bytes,
) -> Array:
    """The same for a GPTQ module, activation order undone."""
    qweight, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"]
    width = qweight.shape[0] * 32 // scheme.bits
    code = bits_to_numbers(load(qweight, read)[:, rows].T, scheme.bits, width)
    zero = bits_to_numbers(load(tensors[f"{module}.qzeros"], read), scheme.bits, qweight.shape[1])[:, rows].T
    if version == 1:
        zero = zero + 1
    order = tensors.get(f"{module}.g_idx")
    group = group_of(width, scheme) if order is None else np.asarray(load(order, read)).astype(np.int64)
    scale = floats(load(scales, read)[:, rows].T, scales.dtype)
    return (code - zero[:, group]).astype(np.float32) * scale[:, group]


def awq(module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, rows: Array, read: Bytes = raw_bytes) -> Array:
    """The same for an AWQ module: column 8w + order[i] is nibble i of word w."""
    words = {part: load(tensors[f"{module}.{part}"], read) for part in ("qweight", "qzeros")}
    count = words["qweight"].shape[1] * 8
    column = np.arange(count).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    place = np.argsort(column)[rows]  # where each wanted output channel lies
    code, zero = (bits_to_numbers(words[part], 4, count)[:, place].T for part in ("qweight", "qzeros"))
    group = group_of(code.shape[1], scheme)
    info = tensors[f"{module}.scales"]
    scale = floats(load(info, read)[:, rows].T, info.dtype)
    return (code - zero[:, group]).astype(np.float32) * scale[:, group]


def bitsandbytes_4bit(
    module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, rows: Array, read: Bytes = raw_bytes
) -> Array:
    """The same for NF4 and FP4, with the levels that the file itself holds."""
    part = {name.removeprefix(f"{module}.weight"): info for name, info in tensors.items()}
    state = json.loads(bytes(load(part[f".quant_state.bitsandbytes__{scheme.dtype}"], read)))
    absmax = load(part[".absmax"], read)
    if "nested_offset" in state:
        block = np.arange(len(absmax)) // state["nested_blocksize"]
        absmax = load(part[".nested_quant_map"], read)[absmax] * load(part[".nested_absmax"], read)[block]
        absmax = absmax + np.float32(state["nested_offset"])
    width = state["shape"][1]
    index = rows[:, None] * width + np.arange(width)
    octet = load(part[""], read).reshape(-1)[index // 2]
    code = np.where(index % 2 == 0, octet >> 4, octet & 15)
    return load(part[".quant_map"], read)[code] * absmax[index // state["blocksize"]]


def bitsandbytes_int8(
    module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, rows: Array, read: Bytes = raw_bytes
) -> Array:
    """The same for rows of int8 with their largest magnitudes."""
    scale = load(tensors[f"{module}.SCB"], read)[rows] / np.float32(127)
    return load(tensors[f"{module}.weight"], read)[rows].astype(np.float32) * scale[:, None]


def _fp4(octets: Array, scale: Array, divisor: Array | None) -> Array:
    """e2m1 (sign, 2 bits of exponent with bias 1, 1 of mantissa), two to a byte; scales are e4m3 over a divisor, or, if
    there is none, powers of two."""
    nibble = np.stack((octets & 15, octets >> 4), axis=-1).reshape(len(octets), -1)
    level = _small_float(nibble, exponent_bits=2, mantissa_bits=1, bias=1)
    if divisor is None:
        unit = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    else:
        unit = _small_float(scale, exponent_bits=4, mantissa_bits=3, bias=7) / divisor
    return level * np.repeat(unit, level.shape[1] // unit.shape[1], axis=1)


def _small_float(pattern: Array, *, exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """Floats of a few bits by their definition, fp32; exponent 0 is subnormal, and nothing is infinite."""
    exponent = (pattern >> mantissa_bits).astype(np.int32) & ((1 << exponent_bits) - 1)
    part = (pattern & ((1 << mantissa_bits) - 1)).astype(np.float32) / (1 << mantissa_bits)
    magnitude = np.where(exponent == 0, part, 1 + part) * np.exp2(np.maximum(exponent, 1) - float(bias))
    return np.where(pattern >> (exponent_bits + mantissa_bits), -magnitude, magnitude).astype(np.float32)


def _fp8(octets: Array, scale: Array, rows: Array, scheme: Scheme) -> Array:
    level = _small_float(octets, exponent_bits=4, mantissa_bits=3, bias=7)
    if scheme.blocks:
        return level * scale[rows // scheme.group_size][:, group_of(octets.shape[1], scheme)]
    return level * (scale.reshape(-1, 1)[rows] if scale.size > 1 else scale.reshape(1, 1))


def group_of(width: int, scheme: Scheme) -> Array:
    """The group of each input channel."""
    return np.zeros(width, np.int64) if scheme.group_size == -1 else np.arange(width) // scheme.group_size
