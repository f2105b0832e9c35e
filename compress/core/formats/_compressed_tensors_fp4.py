"""mxfp4-pack-quantized and nvfp4-pack-quantized of compressed-tensors: see compressed_tensors.py for the tensors.

O output channels, K input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.core.errors import ArtifactError, UsageError
from compress.core.formats import Read
from compress.core.formats._checks import misfit
from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor

_DIVISOR = "weight_global_scale"
_DIVISOR_BYTES = 4
_WORD_BYTES = 4


def parts_of(scheme: Scheme) -> tuple[str, ...]:
    """The last parts of the names of a module's tensors."""
    return ("weight_packed", "weight_scale", *([_DIVISOR] if scheme.dtype == "nvfp4" else []))


def encode(tensor: QuantTensor) -> dict[str, torch.Tensor]:
    """The tensors of a module, by the last part of their names. Two codes to a byte are the words of a QuantTensor."""
    scale = tensor.scale if tensor.scheme.dtype == "nvfp4" else tensor.scale.view(torch.uint8)
    parts = {"weight_packed": tensor.packed.contiguous().view(torch.uint8), "weight_scale": scale}
    if tensor.divisor is not None:
        first = tensor.divisor[0]
        if not bool((tensor.divisor == first).all()):
            raise UsageError(
                "rows of these nvfp4 weights differ in their divisor: a file holds one for the whole tensor"
            )
        parts[_DIVISOR] = first.clone()
    return parts


def encoded_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Exact bytes of all tensors that `encode` gives for a weight [out, in], headers apart."""
    rows, width = shape
    return rows * (width // 2 + scheme.groups_in(width)) + (_DIVISOR_BYTES if scheme.dtype == "nvfp4" else 0)


def shape_of(module: str, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape [out, in] of a module, from headers."""
    name = f"{module}.weight_packed"
    if name not in tensors:
        raise ArtifactError("is missing", where=name)
    shape = tensors[name].shape
    if len(shape) != 2:
        raise ArtifactError(f"has shape {list(shape)}, not two dimensions", where=name)
    return shape[0], 2 * shape[1]


def decode(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    """Read one module back; ArtifactError names the tensor that does not fit."""
    octets, scale = read(f"{module}.weight_packed"), read(f"{module}.weight_scale")
    if octets.dtype != torch.uint8 or octets.dim() != 2 or octets.shape[1] * 2 % scheme.group_size:
        raise misfit(module, "weight_packed", octets, f"uint8 [out, in/2] with in a multiple of {scheme.group_size}")
    rows, width = octets.shape[0], octets.shape[1] * 2
    stored = torch.float8_e4m3fn if scheme.dtype == "nvfp4" else torch.uint8
    if scale.dtype != stored or tuple(scale.shape) != (rows, scheme.groups_in(width)):
        wanted = f"{str(stored).removeprefix('torch.')} {[rows, scheme.groups_in(width)]}"
        raise misfit(module, "weight_scale", scale, wanted)
    if scheme.dtype == "mxfp4":
        return QuantTensor(_words(octets), scale.view(torch.float8_e8m0fnu), None, scheme, (rows, width))
    divisor = _divisor(module, read(f"{module}.{_DIVISOR}")).expand(rows, 1).contiguous()
    return QuantTensor(_words(octets), scale, None, scheme, (rows, width), divisor=divisor)


def _divisor(module: str, divisor: torch.Tensor) -> torch.Tensor:
    if divisor.dtype != torch.float32 or divisor.numel() != 1:
        raise misfit(module, _DIVISOR, divisor, "float32 [1]")
    if not 0 < float(divisor) < float("inf"):
        raise ArtifactError(f"is {float(divisor)}, not a positive number", where=f"{module}.{_DIVISOR}")
    return divisor.reshape(1, 1)


def _words(octets: torch.Tensor) -> torch.Tensor:
    """Rows of bytes as 32-bit words: the same memory, unless it begins within a word."""
    octets = octets.contiguous()
    return (octets.clone() if octets.data_ptr() % _WORD_BYTES else octets).view(torch.int32)
