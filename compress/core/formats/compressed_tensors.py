"""compressed-tensors on disk: pack-quantized (2 to 8 bits), int-quantized (8-bit weights and inputs),
float-quantized (fp8), mxfp4-pack-quantized and nvfp4-pack-quantized.

Format: https://github.com/neuralmagic/compressed-tensors. O output channels, K input channels, G groups, b bits.

pack-quantized   weight_packed     int32 [O, ceil(K*b/32)]   code + 2^(b-1), one dense bit stream per row
                 weight_scale      [O, G] in the source's dtype
                 weight_shape      int64 [2] = (O, K)
                 weight_zero_point int32 [ceil(O*b/32), G]   zero + 2^(b-1), one bit stream per column; asymmetric only
int-quantized    weight            int8 [O, K]
                 weight_scale      [O, G]
                 weight_zero_point int8 [O, G]               asymmetric only
                 input_scale       [1]                       static inputs only
float-quantized  weight            float8_e4m3fn [O, K]
                 weight_scale      [O, 1]; of square blocks [ceil(O/size), G]; read only: [1] for the whole tensor
mxfp4-pack-…     weight_packed     uint8 [O, K/2]             the first of two codes in the low bits
                 weight_scale      uint8 [O, K/32]            exponent + 127 of a power of two (E8M0)
nvfp4-pack-…     weight_packed     uint8 [O, K/2]
                 weight_scale      float8_e4m3fn [O, K/16]
                 weight_global_scale fp32 [1]                 what scales are divided by

weight = (code - zero) * scale, code and zero both in the signed domain -2^(b-1) … 2^(b-1)-1; or level * scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from compress.core.errors import ArtifactError, UsageError
from compress.core.formats import Read
from compress.core.formats import _compressed_tensors_fp4 as fp4
from compress.core.formats._checks import misfit, turned
from compress.core.formats._compressed_tensors_config import is_int_quantized, quantization_config, scheme_of
from compress.core.safetensors_io import TensorInfo, load_tensor
from compress.core.scheme import OWN_GROUPS, Scheme
from compress.core.tensors import QuantTensor, pack_rows, unpack_rows, words_in

__all__ = [
    "decode",
    "dequantize",
    "encode",
    "encoded_bytes",
    "modules_of",
    "quantization_config",
    "scheme_of",
    "shape_of",
    "stored_names",
]
OPTIONAL: tuple[str, ...] = ()

SHAPE_BYTES = 16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def encode(module: str, tensor: QuantTensor) -> dict[str, torch.Tensor]:
    """The tensors that hold `tensor` on disk, by disk name."""
    scheme = tensor.scheme
    if scheme.dtype not in ("int", "fp8", *OWN_GROUPS):
        raise UsageError(f"{scheme.name} weights are not written")
    if scheme.dtype in OWN_GROUPS:
        parts = fp4.encode(tensor)
    elif scheme.dtype == "fp8":
        parts = {"weight": tensor.stored().view(torch.float8_e4m3fn), "weight_scale": _once_a_block(module, tensor)}
    elif is_int_quantized(scheme):
        parts = {"weight": tensor.codes(), "weight_scale": tensor.scale}
        if tensor.zero is not None:
            parts["weight_zero_point"] = tensor.zero
    else:
        shape = torch.tensor(tensor.shape, dtype=torch.int64)
        parts = {"weight_packed": tensor.packed, "weight_scale": tensor.scale, "weight_shape": shape}
        if tensor.zero is not None:
            unsigned_OG = (tensor.zero.to(torch.int16) - scheme.lowest).to(torch.uint8)
            parts["weight_zero_point"] = pack_rows(turned(unsigned_OG), scheme.bits).T
    if scheme.static_inputs:
        if tensor.input_scale is None:
            raise UsageError("its static inputs have no scale yet", where=module)
        parts["input_scale"] = tensor.input_scale
    return {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules whose quantized weight is among tensors of these disk names."""
    names = set(names)
    scaled = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
    return sorted(scaled | {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")})


def stored_names(module: str, scheme: Scheme) -> tuple[str, ...]:
    """Disk names of the tensors that hold `module` under `scheme`: all of them and no others."""
    if scheme.dtype in OWN_GROUPS:
        return tuple(f"{module}.{suffix}" for suffix in fp4.parts_of(scheme))
    plain = is_int_quantized(scheme) or scheme.dtype == "fp8"
    suffixes = ["weight", "weight_scale"] if plain else ["weight_packed", "weight_scale", "weight_shape"]
    if not scheme.symmetric:
        suffixes.append("weight_zero_point")
    if scheme.static_inputs:
        suffixes.append("input_scale")
    return tuple(f"{module}.{suffix}" for suffix in suffixes)


def shape_of(module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape [out, in] of a module, from headers and the two numbers of weight_shape."""
    if f"{module}.weight" in tensors:
        shape = tensors[f"{module}.weight"].shape
        if len(shape) != 2:
            raise ArtifactError(f"has shape {list(shape)}, not two dimensions", where=f"{module}.weight")
        return shape[0], shape[1]
    if scheme.dtype in OWN_GROUPS:
        return fp4.shape_of(module, tensors)
    if f"{module}.weight_shape" not in tensors:
        raise ArtifactError("is missing", where=f"{module}.weight_shape")
    info = tensors[f"{module}.weight_shape"]
    if info.shape != (2,) or info.dtype not in ("I64", "I32"):
        raise ArtifactError(f"is {info.dtype} {list(info.shape)}, not two whole numbers", where=info.name)
    rows, width = (int(value) for value in load_tensor(info).tolist())
    if rows < 1 or width < 1:
        raise ArtifactError(f"says {[rows, width]}", where=info.name)
    return rows, width


def encoded_bytes(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Exact bytes of all tensors that `encode` gives for a weight [out, in] of `shape`, headers apart."""
    rows, width = shape
    groups = scheme.groups_in(width)
    if scheme.dtype in OWN_GROUPS:
        return fp4.encoded_bytes(shape, scheme)
    total = -(-rows // scheme.rows_per_scale) * groups * scale_dtype.itemsize
    total += scale_dtype.itemsize if scheme.static_inputs else 0
    if is_int_quantized(scheme) or scheme.dtype == "fp8":
        return total + rows * width + (0 if scheme.symmetric else rows * groups)
    total += rows * words_in(width, scheme.bits) * 4 + SHAPE_BYTES
    return total + (0 if scheme.symmetric else words_in(rows, scheme.bits) * groups * 4)


def decode(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    """Read one module back. `read` gives a tensor by disk name; ArtifactError names the tensor that does not fit."""
    weight = _weight(module, read, scheme)
    return replace(weight, input_scale=input_scale(module, read)) if scheme.static_inputs else weight


def input_scale(module: str, read: Read) -> torch.Tensor:
    """The scale [1] of a module's static inputs."""
    scale = read(f"{module}.input_scale")
    if scale.dtype not in _FLOATS or scale.numel() != 1 or not float(scale) > 0:
        raise misfit(module, "input_scale", scale, "one positive float")
    return scale.reshape(1)


def _weight(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    if scheme.dtype == "fp8":
        return _fp8(module, read, scheme)
    if scheme.dtype in OWN_GROUPS:
        return fp4.decode(module, read, scheme)
    scale = read(f"{module}.weight_scale")
    if scale.dtype not in _FLOATS or scale.dim() != 2:
        raise misfit(module, "weight_scale", scale, "a 2-dimensional float tensor")
    if is_int_quantized(scheme):
        codes = read(f"{module}.weight")
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise misfit(module, "weight", codes, "int8 [out, in]")
        rows, width = codes.shape
        _check(module, "weight_scale", scale, (rows, scheme.groups_in(width)))
        zero = None if scheme.symmetric else read(f"{module}.weight_zero_point")
        if zero is not None:
            _check(module, "weight_zero_point", zero, tuple(scale.shape), torch.int8)
        return QuantTensor.from_codes(codes, scale, zero, scheme)
    packed = read(f"{module}.weight_packed")
    rows, width = _stored_shape(module, read(f"{module}.weight_shape"), packed)
    _check(module, "weight_packed", packed, (rows, words_in(width, scheme.bits)), torch.int32)
    _check(module, "weight_scale", scale, (rows, scheme.groups_in(width)))
    zero = None if scheme.symmetric else _zero_points(module, read(f"{module}.weight_zero_point"), scale, scheme)
    return QuantTensor(packed, scale, zero, scheme, (rows, width))


def dequantize(module: str, read: Read, scheme: Scheme, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The module's weight [out, in], computed in fp32 and rounded once to `dtype`."""
    return decode(module, read, scheme).dequantize(dtype)


def _fp8(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    """A scale of the whole tensor is repeated for each output channel."""
    codes, scale = read(f"{module}.weight"), read(f"{module}.weight_scale")
    if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2:
        raise misfit(module, "weight", codes, "float8_e4m3fn [out, in]")
    rows = len(codes)
    if scheme.blocks:
        return QuantTensor.from_stored(codes.view(torch.uint8), _of_blocks(module, scale, codes, scheme), None, scheme)
    if scale.dtype not in _FLOATS or tuple(scale.shape) not in ((rows, 1), (1,), (), (1, 1)):
        raise misfit(module, "weight_scale", scale, f"floats {[rows, 1]} or [1]")
    scale_O1 = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    return QuantTensor.from_stored(codes.view(torch.uint8), scale_O1, None, scheme)


def _once_a_block(module: str, tensor: QuantTensor) -> torch.Tensor:
    """Scales as they are stored: of each block's channels, which have one, the first's."""
    rows = tensor.scheme.rows_per_scale
    scale_BG = tensor.scale[::rows]
    if rows > 1 and not torch.equal(scale_BG[torch.arange(tensor.shape[0]) // rows], tensor.scale):
        raise UsageError("channels of one block have different scales", where=module)
    return scale_BG


def _of_blocks(module: str, scale_BG: torch.Tensor, codes_OK: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales [O, G] from those of blocks."""
    rows, width = codes_OK.shape
    wanted = (-(-rows // scheme.rows_per_scale), scheme.groups_in(width))
    if width % scheme.group_size:
        raise misfit(module, "weight", codes_OK, f"input channels in whole blocks of {scheme.group_size}")
    if scale_BG.dtype not in _FLOATS or tuple(scale_BG.shape) != wanted:
        raise misfit(module, "weight_scale", scale_BG, f"floats {list(wanted)}")
    return scale_BG[torch.arange(rows) // scheme.rows_per_scale]


def _stored_shape(module: str, shape: torch.Tensor, packed: torch.Tensor) -> tuple[int, int]:
    if shape.dtype not in (torch.int64, torch.int32) or tuple(shape.shape) != (2,):
        raise misfit(module, "weight_shape", shape, "int64 [2]")
    rows, width = (int(value) for value in shape.tolist())
    if packed.dim() != 2 or rows != packed.shape[0] or not 1 <= width <= packed.shape[1] * 16:
        raise ArtifactError(
            f"says [{rows}, {width}], which does not fit weight_packed {list(packed.shape)}",
            where=f"{module}.weight_shape",
        )
    return rows, width


def _zero_points(module: str, packed: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    rows, groups = scale.shape
    _check(module, "weight_zero_point", packed, (words_in(rows, scheme.bits), groups), torch.int32)
    unsigned_GO = unpack_rows(turned(packed), scheme.bits, rows)
    return (unsigned_GO.T.to(torch.int16) + scheme.lowest).to(torch.int8).contiguous()


def _check(
    module: str, suffix: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        wanted = f"{'' if dtype is None else str(dtype).removeprefix('torch.') + ' '}{list(shape)}"
        raise misfit(module, suffix, tensor, wanted)
