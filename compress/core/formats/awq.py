"""AWQ on disk, version gemm: read and written.

Paper: Lin et al. 2023, https://arxiv.org/abs/2306.00978; layout of AutoAWQ. O output channels, K input channels, G
groups, 4 bits:

qweight int32 [K, O/8]   unsigned codes of 8 output channels, whose nibbles lie in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros  int32 [G, O/8]   unsigned zero points, in the same order
scales  [G, O]

weight[o, k] = (code - zero[k // group_size]) * scale[k // group_size]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from compress.core.errors import ArtifactError, InputError
from compress.core.formats import NotRead, Read
from compress.core.formats._checks import exact_in_half, misfit, turned, usual_scheme
from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor, pack_rows, unpack_rows

OPTIONAL: tuple[str, ...] = ()
_WHERE = "config.json: quantization_config"
_BITS = 4
_PER_WORD = 8
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds each of 8 output channels
_CHANNEL_OF = (0, 2, 4, 6, 1, 3, 5, 7)  # the output channel that each of 8 nibbles holds
_KNOWN_VERSIONS = frozenset({"gemv", "gemv_fast", "llm-awq", "exllama", "ipex", "marlin"})


def encode(module: str, tensor: QuantTensor) -> dict[str, torch.Tensor]:
    """Tensors of one module of 4 bits by disk name. A symmetric one gets zero points in the middle: 8.

    Scales are fp16 where that is exact, else as they are.
    """
    scale_GO = turned(exact_in_half(tensor.scale))
    zero_OG = torch.zeros(tensor.scale.shape, dtype=torch.int8) if tensor.zero is None else tensor.zero
    unsigned_OG = (zero_OG.to(torch.int16) - tensor.scheme.lowest).to(torch.uint8)
    parts = {"qweight": _out_of_order(tensor.stored().T), "qzeros": _out_of_order(unsigned_OG.T), "scales": scale_GO}
    return {f"{module}.{suffix}": part for suffix, part in parts.items()}


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of version gemm; all modules share one group size. `unquantized` stay as they are."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": _BITS,
        "group_size": usual_scheme(schemes).group_size,
        "zero_point": True,
        "modules_to_not_convert": sorted(unquantized),
    }


def encoded_bytes(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Exact bytes of all tensors that `encode` gives for a weight [out, in] of `shape`, headers apart.

    `scale_dtype` is that of the scales on disk.
    """
    rows, width = shape
    groups = scheme.groups_in(width)
    return (width + groups) * rows * _BITS // 8 + groups * rows * scale_dtype.itemsize


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules whose quantized weight is among tensors of these disk names."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def stored_names(module: str, scheme: Scheme) -> tuple[str, ...]:
    """Disk names of the tensors that hold `module`."""
    return tuple(f"{module}.{suffix}" for suffix in ("qweight", "qzeros", "scales"))


def shape_of(module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape [out, in] of a module, from headers."""
    shape = tensors[f"{module}.qweight"].shape
    if len(shape) != 2:
        raise ArtifactError(f"has shape {list(shape)}, not two dimensions", where=f"{module}.qweight")
    return shape[1] * _PER_WORD, shape[0]


def scheme_of(module: str, config: Mapping[str, Any]) -> Scheme | None:
    """Scheme of `module`, None if the config leaves it out. Layers without a qweight tensor are dense all the same."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        refusal = NotRead if version in _KNOWN_VERSIONS else InputError
        raise refusal(f"version {version!r} of awq is not read: gemm is", where=_WHERE)
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits != _BITS:
        raise InputError(f"bits {bits!r} is not read: awq has 4", where=_WHERE)
    if type(size) is not int or size == 0 or size < -1:
        raise InputError(f"group_size {size!r} makes no sense", where=_WHERE)
    asymmetric = config.get("zero_point", True)
    if not isinstance(asymmetric, bool):
        raise InputError(f"zero_point {asymmetric!r} is neither true nor false", where=_WHERE)
    left_out = config.get("modules_to_not_convert") or []
    if not isinstance(left_out, list) or not all(isinstance(entry, str) for entry in left_out):
        raise InputError("modules_to_not_convert is not a list of names", where=_WHERE)
    if any(f".{entry}." in f".{module}." for entry in left_out):
        return None
    return Scheme(_BITS, size, symmetric=not asymmetric)


def decode(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    """Codes, scales and zero points as stored."""
    qweight, qzeros, scales = (read(name) for name in stored_names(module, scheme))
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise misfit(module, "qweight", qweight, "int32 [in, out / 8]")
    width, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD
    groups = scheme.groups_in(width)
    if qzeros.dtype != torch.int32 or tuple(qzeros.shape) != (groups, qweight.shape[1]):
        raise misfit(module, "qzeros", qzeros, f"int32 {[groups, qweight.shape[1]]}")
    if not scales.is_floating_point() or tuple(scales.shape) != (groups, rows):
        raise misfit(module, "scales", scales, f"floats {[groups, rows]}")
    zero_GO = _in_order(qzeros).to(torch.int8) + scheme.lowest
    if scheme.symmetric and bool(zero_GO.any()):
        raise ArtifactError("holds zero points although the config says zero_point false", where=f"{module}.qzeros")
    zero = None if scheme.symmetric else turned(zero_GO)
    return QuantTensor.from_stored(turned(_in_order(qweight)), turned(scales), zero, scheme)


def dequantize(module: str, read: Read, scheme: Scheme, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The module's weight [out, in], computed in fp32 and rounded once to `dtype`."""
    return decode(module, read, scheme).dequantize(dtype)


def _in_order(words_RW: torch.Tensor) -> torch.Tensor:
    """int32 [R, O/8] -> unsigned codes uint8 [R, O], output channels in their order."""
    rows, words = words_RW.shape
    nibbles = unpack_rows(words_RW, _BITS, words * _PER_WORD).view(rows, words, _PER_WORD)
    return nibbles[:, :, _NIBBLE_OF].reshape(rows, words * _PER_WORD)


def _out_of_order(codes_RO: torch.Tensor) -> torch.Tensor:
    """Inverse of `_in_order`."""
    rows, columns = codes_RO.shape
    octets = codes_RO.reshape(rows, columns // _PER_WORD, _PER_WORD)[:, :, _CHANNEL_OF]
    return pack_rows(octets.reshape(rows, columns), _BITS)
