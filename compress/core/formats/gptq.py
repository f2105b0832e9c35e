"""GPTQ on disk: versions 1 and 2 are read, version 1 is written (symmetric, groups in their order).

Paper: Frantar et al. 2022, https://arxiv.org/abs/2210.17323; layout of AutoGPTQ. O output channels, K input channels,
G groups, b bits:

qweight int32 [ceil(K*b/32), O]   unsigned code, one dense bit stream per column, least significant bit first
qzeros  int32 [G, ceil(O*b/32)]   unsigned zero point, one bit stream per row; version 1 stores zero - 1
scales  [G, O]
g_idx   int32 [K]                 the group of each input channel; absent or k // group_size unless act-order was used

weight[o, k] = (code - zero[g_idx[k]]) * scale[g_idx[k]]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from compress.core.errors import ArtifactError, InputError
from compress.core.formats import NotKept, NotRead, Read
from compress.core.formats._checks import exact_in_half, misfit, turned, usual_scheme
from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor, pack_rows, unpack_rows, words_in

OPTIONAL = (".g_idx",)
_WHERE = "config.json: quantization_config"
_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_KNOWN_VERSIONS = frozenset({"marlin", "bitblas", "gptq_p", "qqq", "gguf", "exl3", "fp8", "awq"})


def encode(module: str, tensor: QuantTensor) -> dict[str, torch.Tensor]:
    """Tensors of one symmetric module by disk name, version 1.

    Scales are fp16 where that is exact, else as they are.
    """
    scheme, (rows, width) = tensor.scheme, tensor.shape
    scale_GO = turned(exact_in_half(tensor.scale))
    zero_GO = torch.full((len(scale_GO), rows), -scheme.lowest - 1, dtype=torch.uint8)  # version 1: less one
    parts = {
        "qweight": turned(tensor.packed),
        "qzeros": pack_rows(zero_GO, scheme.bits),
        "scales": scale_GO,
        "g_idx": _plain_groups(width, scheme),
    }
    return {f"{module}.{suffix}": part for suffix, part in parts.items()}


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of version 1: the most frequent scheme, and `dynamic` for modules that differ from it.

    `unquantized` are the linear modules that stay as they are, which a reader would else expect to be quantized.
    """
    usual = usual_scheme(schemes)
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(module)}$": {} for module in unquantized}
    for module, scheme in schemes.items():
        if scheme != usual:
            dynamic[f"+:^{re.escape(module)}$"] = {"bits": scheme.bits, "group_size": scheme.group_size}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "sym": True,
        "desc_act": False,
        "pack_dtype": "int32",
        "lm_head": any(module.rpartition(".")[2] == "lm_head" for module in schemes),
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def encoded_bytes(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Exact bytes of all tensors that `encode` gives for a weight [out, in] of `shape`, headers apart.

    `scale_dtype` is that of the scales on disk.
    """
    rows, width = shape
    groups = scheme.groups_in(width)
    words = words_in(width, scheme.bits) * rows + words_in(rows, scheme.bits) * groups + width
    return 4 * words + groups * rows * scale_dtype.itemsize


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules whose quantized weight is among tensors of these disk names."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def stored_names(module: str, scheme: Scheme) -> tuple[str, ...]:
    """Disk names of the tensors that hold `module`; g_idx may be missing."""
    return tuple(f"{module}.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx"))


def shape_of(module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape [out, in] of a module, from headers."""
    shape = tensors[f"{module}.qweight"].shape
    if len(shape) != 2:
        raise ArtifactError(f"has shape {list(shape)}, not two dimensions", where=f"{module}.qweight")
    return shape[1], shape[0] * 32 // scheme.bits


def version_of(config: Mapping[str, Any]) -> int:
    """1 if zero points are stored less one, 2 if as they are."""
    name = config.get("checkpoint_format") or "gptq"
    if name not in _VERSIONS:
        refusal = NotRead if name in _KNOWN_VERSIONS else InputError
        raise refusal(f"checkpoint_format {name!r} is not read: gptq and gptq_v2 are", where=_WHERE)
    if config.get("pack_dtype", "int32") != "int32":
        raise NotRead(f"pack_dtype {config['pack_dtype']!r} is not read: int32 is", where=_WHERE)
    return _VERSIONS[name]


def scheme_of(module: str, config: Mapping[str, Any]) -> Scheme | None:
    """Scheme of `module`, None if it is not quantized. Layers without a qweight tensor are dense whatever this says."""
    version_of(config)
    settings = dict(config)
    if module.rpartition(".")[2] == "lm_head" and not config.get("lm_head"):
        return None
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise InputError("dynamic is not a mapping", where=_WHERE)
    for pattern, changes in dynamic.items():
        if not _pattern(pattern).match(module):
            continue
        if pattern.startswith("-:"):
            return None
        if not isinstance(changes, Mapping):
            raise InputError(f"dynamic {pattern!r} is not a mapping", where=_WHERE)
        settings |= changes
        break
    bits, size, symmetric = settings.get("bits"), settings.get("group_size"), settings.get("sym", True)
    if type(bits) is not int or bits not in _BITS:
        raise InputError(f"bits {bits!r} is not read: 2, 3, 4 and 8 are", where=_WHERE)
    if type(size) is not int or size == 0 or size < -1:
        raise InputError(f"group_size {size!r} makes no sense", where=_WHERE)
    if not isinstance(symmetric, bool):
        raise InputError(f"sym {symmetric!r} is neither true nor false", where=_WHERE)
    return Scheme(bits, size, symmetric)


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("+:").removeprefix("-:"))
    except re.error as error:
        raise InputError(f"dynamic {pattern!r} is not a valid pattern: {error}", where=_WHERE) from None


def decode(module: str, read: Read, scheme: Scheme, *, version: int = 1) -> QuantTensor:
    """Codes, scales and zero points as stored. NotKept for activation order: only `dequantize` can read that."""
    packed, scale, zero, group_K = _parts(module, read, scheme, version)
    width = len(group_K)
    if not torch.equal(group_K, _plain_groups(width, scheme)):
        raise NotKept(
            "groups follow an activation order, which is not kept: the weight can only be dequantized",
            where=f"{module}.g_idx",
        )
    if scheme.symmetric:
        zero = None
    return QuantTensor(packed, scale, zero, scheme, (packed.shape[0], width))


def dequantize(
    module: str, read: Read, scheme: Scheme, dtype: torch.dtype = torch.float32, *, version: int = 1
) -> torch.Tensor:
    """The module's weight [out, in], activation order undone; computed in fp32 and rounded once to `dtype`."""
    packed, scale, zero, group_K = _parts(module, read, scheme, version)
    codes = unpack_rows(packed, scheme.bits, len(group_K)).float() + scheme.lowest
    index = group_K.long()
    return ((codes - zero.float()[:, index]) * scale.float()[:, index]).to(dtype)


def _parts(
    module: str, read: Read, scheme: Scheme, version: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """packed [O, W], scale [O, G], zero int8 [O, G] in the signed domain, group of each input channel [K]."""
    qweight, scales = read(f"{module}.qweight"), read(f"{module}.scales")
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise misfit(module, "qweight", qweight, "int32 [words, out]")
    words, rows = qweight.shape
    width = words * 32 // scheme.bits
    groups = scheme.groups_in(width)
    if not scales.is_floating_point() or tuple(scales.shape) != (groups, rows):
        raise misfit(module, "scales", scales, f"floats {[groups, rows]}")
    zero = _zero_points(module, read(f"{module}.qzeros"), scheme, (groups, rows), version)
    return turned(qweight), turned(scales), zero, _groups(module, read, scheme, width, groups)


def _zero_points(
    module: str, qzeros: torch.Tensor, scheme: Scheme, shape: tuple[int, int], version: int
) -> torch.Tensor:
    groups, rows = shape
    where = f"{module}.qzeros"
    wanted = (groups, words_in(rows, scheme.bits))
    if qzeros.dtype != torch.int32 or tuple(qzeros.shape) != wanted:
        raise misfit(module, "qzeros", qzeros, f"int32 {list(wanted)}")
    unsigned_GO = unpack_rows(qzeros, scheme.bits, rows).to(torch.int16) + (2 - version)
    if int(unsigned_GO.max()) >= 1 << scheme.bits:
        raise ArtifactError("holds a zero point that version 1 of the format cannot mean", where=where)
    zero_GO = unsigned_GO + scheme.lowest
    if scheme.symmetric and bool(zero_GO.any()):
        raise ArtifactError("holds zero points although the config says sym", where=where)
    return turned(zero_GO.to(torch.int8))


def _groups(module: str, read: Read, scheme: Scheme, width: int, groups: int) -> torch.Tensor:
    try:
        group_K = read(f"{module}.g_idx")
    except (KeyError, InputError):
        return _plain_groups(width, scheme)
    where = f"{module}.g_idx"
    if group_K.dtype not in (torch.int32, torch.int64) or tuple(group_K.shape) != (width,):
        raise misfit(module, "g_idx", group_K, f"int32 [{width}]")
    if int(group_K.min()) < 0 or int(group_K.max()) >= groups:
        raise ArtifactError(f"names a group outside 0 … {groups - 1}", where=where)
    return group_K.to(torch.int32)


def _plain_groups(width: int, scheme: Scheme) -> torch.Tensor:
    size = scheme.group_width(width)
    return torch.arange(width, dtype=torch.int32) // size
