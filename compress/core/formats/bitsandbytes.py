"""bitsandbytes on disk, as transformers writes it. Read: NF4 and FP4 with plain or quantized statistics, and int8.
Written: NF4 with plain statistics (a QuantTensor has its scales as numbers, not as codes of their own).

Papers: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) and LLM.int8() (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339). O output channels, K input channels, B blocks of 64 weights each along the rows:

4 bits  weight                            uint8 [O*K/2, 1]  two codes a byte, the first in the high nibble
        weight.absmax                     fp32 [B], or uint8 [B] if statistics are quantized themselves
        weight.quant_map                  fp32 [16]         the level of each code
        weight.nested_absmax              fp32 [B/256]      statistics of the statistics, if these are quantized
        weight.nested_quant_map           fp32 [256]
        weight.quant_state.bitsandbytes__nf4 (or fp4)       JSON as bytes: shape, blocksize, nested_offset, …
8 bits  weight                            int8 [O, K]
        SCB                               fp32 [O]          largest magnitude of each row
        weight_format                     uint8 []          0: rows as they are

weight = level * absmax, or code * SCB / 127. LLM.int8() itself also rounds inputs, outliers apart; here inputs stay as
they are, which is closer to the original model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from compress.core.errors import ArtifactError, InputError
from compress.core.formats import NotKept, NotRead, Read
from compress.core.formats._checks import misfit, usual_scheme
from compress.core.levels import table
from compress.core.safetensors_io import TensorInfo, load_tensor
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor

OPTIONAL = (".weight.nested_absmax", ".weight.nested_quant_map", ".weight_format")
_WHERE = "config.json: quantization_config"
_BLOCK = 64  # transformers leaves it at this; what the file says wins
_NESTED_BLOCK = 256
_CODES_PER_BYTE = 2
_MAP_BYTES = 16 * 4
_LARGEST_CODE = 127
_STATE_LIMIT_BYTES = 1 << 16
_LARGEST_SIDE = 1 << 40
_FOUR_BIT_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


@dataclass(frozen=True, slots=True)
class State:
    """What the JSON beside a 4-bit weight says. `offset` None: statistics are not quantized themselves."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float | None


def encode(module: str, tensor: QuantTensor) -> dict[str, torch.Tensor]:
    """Tensors of one nf4 module by disk name. The dtype that readers dequantize it to is that of its scales."""
    scheme = tensor.scheme
    low_first = tensor.packed.contiguous().view(torch.uint8).reshape(-1, 1)
    state = bytearray(_described(tensor.shape, scheme, tensor.scale.dtype))
    parts = {
        "weight": (low_first << 4) | (low_first >> 4),
        "weight.absmax": tensor.scale.float().reshape(-1),
        "weight.quant_map": table(scheme.dtype).clone(),
        _state_part(scheme): torch.frombuffer(state, dtype=torch.uint8),
    }
    return {f"{module}.{suffix}": part for suffix, part in parts.items()}


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of nf4 weights; `unquantized` stay as they are."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": usual_scheme(schemes).dtype,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(unquantized),
    }


def encoded_bytes(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Exact bytes of all tensors that `encode` gives for a weight [out, in] of `shape`, headers apart."""
    rows, width = shape
    statistics = rows * scheme.groups_in(width) * 4
    return rows * width // _CODES_PER_BYTE + statistics + _MAP_BYTES + len(_described(shape, scheme, scale_dtype))


def _described(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> bytes:
    """The JSON beside a weight."""
    state = {
        "quant_type": scheme.dtype,
        "blocksize": scheme.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    return json.dumps(state).encode()


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules whose quantized weight is among tensors of these disk names."""
    suffixes = (".weight.quant_map", ".SCB")
    return sorted({name.removesuffix(suffix) for name in names for suffix in suffixes if name.endswith(suffix)})


def stored_names(module: str, scheme: Scheme) -> tuple[str, ...]:
    """Disk names of the tensors that hold `module`; those in OPTIONAL may be missing."""
    if scheme.dtype == "int":
        return tuple(f"{module}.{suffix}" for suffix in ("weight", "SCB", "weight_format"))
    return tuple(f"{module}.{suffix}" for suffix in (*_FOUR_BIT_PARTS, _state_part(scheme)))


def shape_of(module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape [out, in] of a module, from headers and the small state beside it."""
    needed = f"{module}.{'weight' if scheme.dtype == 'int' else _state_part(scheme)}"
    if needed not in tensors:
        raise ArtifactError("is missing", where=needed)
    if scheme.dtype != "int":
        return state_of(module, scheme, lambda name: load_tensor(tensors[name])).shape
    shape = tensors[f"{module}.weight"].shape
    if len(shape) != 2:
        raise ArtifactError(f"has shape {list(shape)}, not two dimensions", where=f"{module}.weight")
    return shape[0], shape[1]


def scheme_of(module: str, config: Mapping[str, Any]) -> Scheme | None:
    """Scheme of every quantized module. Layers without quantized tensors are dense whatever this says."""
    eight, four = (bool(config.get(key) or config.get(f"_{key}")) for key in ("load_in_8bit", "load_in_4bit"))
    if eight == four:
        raise InputError("says neither load_in_4bit nor load_in_8bit, or both", where=_WHERE)
    if eight:
        return Scheme(8)
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise InputError(f"bnb_4bit_quant_type {kind!r} is not read: nf4 and fp4 are", where=_WHERE)
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise NotRead(f"bnb_4bit_quant_storage {storage!r} is not read: uint8 is", where=_WHERE)
    return Scheme(4, _BLOCK, dtype=kind)


def decode(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    """Codes and scales as stored; statistics that are quantized themselves become fp32. NotKept if blocks straddle
    rows: such a weight can only be dequantized."""
    if scheme.dtype == "int":
        return _int8(module, read, scheme)
    state, packed, absmax_B = _four_bit(module, read, scheme)
    rows, width = state.shape
    if width % state.block:
        raise NotKept(
            f"blocks of {state.block} straddle its rows of {width}: the weight can only be dequantized",
            where=f"{module}.weight",
        )
    low_first = (packed << 4) | (packed >> 4)
    words_OW = low_first.view(rows, width // _CODES_PER_BYTE).view(torch.int32)
    scale_OG = absmax_B.view(rows, width // state.block)
    return QuantTensor(words_OW, scale_OG, None, replace(scheme, group_size=state.block), state.shape)


def dequantize(module: str, read: Read, scheme: Scheme, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The module's weight [out, in], computed in fp32 and rounded once to `dtype`."""
    if scheme.dtype == "int":
        return _int8(module, read, scheme).dequantize(dtype)
    state, packed, absmax_B = _four_bit(module, read, scheme)
    count = state.shape[0] * state.shape[1]
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:count].int()
    scale = absmax_B.repeat_interleave(state.block)[:count]
    return (table(scheme.dtype)[codes] * scale).view(state.shape).to(dtype)


def state_of(module: str, scheme: Scheme, read: Read) -> State:
    """The JSON beside a 4-bit weight, checked."""
    where = f"{module}.{_state_part(scheme)}"
    stored = read(where)
    if stored.dtype != torch.uint8 or stored.dim() != 1 or len(stored) > _STATE_LIMIT_BYTES:
        raise misfit(module, _state_part(scheme), stored, "uint8 bytes of JSON")
    try:
        data = json.loads(bytes(stored.tolist()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ArtifactError("is not JSON", where=where) from None
    if not isinstance(data, dict) or data.get("quant_type") != scheme.dtype:
        raise ArtifactError(f"does not describe {scheme.dtype} weights", where=where)
    shape, block, nested = data.get("shape"), data.get("blocksize"), data.get("nested_blocksize", _NESTED_BLOCK)
    if not isinstance(shape, list) or len(shape) != 2 or not all(_positive(side) for side in shape):
        raise ArtifactError(f"shape {shape!r} is not that of a matrix", where=where)
    if not _positive(block) or not _positive(nested):
        raise ArtifactError(f"blocks of {block!r} and {nested!r} make no sense", where=where)
    offset = data.get("nested_offset")
    if offset is not None and not isinstance(offset, int | float):
        raise ArtifactError(f"nested_offset {offset!r} is not a number", where=where)
    return State((shape[0], shape[1]), block, nested, offset)


def _positive(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= _LARGEST_SIDE


def _state_part(scheme: Scheme) -> str:
    return f"weight.quant_state.bitsandbytes__{scheme.dtype}"


def _four_bit(module: str, read: Read, scheme: Scheme) -> tuple[State, torch.Tensor, torch.Tensor]:
    """(state, bytes [O*K/2], fp32 statistics [B])."""
    state = state_of(module, scheme, read)
    count = state.shape[0] * state.shape[1]
    packed = read(f"{module}.weight")
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // _CODES_PER_BYTE):
        raise misfit(module, "weight", packed, f"uint8 [{-(-count // _CODES_PER_BYTE)}, 1]")
    levels = read(f"{module}.weight.quant_map")
    if levels.dtype != torch.float32 or not torch.equal(levels, table(scheme.dtype)):
        raise ArtifactError(f"is not the table of {scheme.dtype}", where=f"{module}.weight.quant_map")
    absmax_B = _statistics(module, read, state)
    _check(module, "weight.absmax", absmax_B, -(-count // state.block))
    return state, packed.reshape(-1), absmax_B


def _statistics(module: str, read: Read, state: State) -> torch.Tensor:
    """Largest magnitude of each block, fp32; those that are quantized themselves are dequantized."""
    absmax_B = read(f"{module}.weight.absmax")
    if state.offset is None:
        return absmax_B
    if absmax_B.dtype != torch.uint8 or absmax_B.dim() != 1:
        raise misfit(module, "weight.absmax", absmax_B, "uint8 codes")
    nested, levels = read(f"{module}.weight.nested_absmax"), read(f"{module}.weight.nested_quant_map")
    _check(module, "weight.nested_absmax", nested, -(-len(absmax_B) // state.nested_block))
    _check(module, "weight.nested_quant_map", levels, 256)
    scale = nested.repeat_interleave(state.nested_block)[: len(absmax_B)]
    return levels[absmax_B.int()] * scale + state.offset


def _int8(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    codes, largest = read(f"{module}.weight"), read(f"{module}.SCB")
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise misfit(module, "weight", codes, "int8 [out, in]")
    _check(module, "SCB", largest, len(codes))
    try:
        order = read(f"{module}.weight_format")
    except (KeyError, InputError):
        order = torch.zeros((), dtype=torch.uint8)
    if order.numel() != 1 or int(order) != 0:
        raise ArtifactError("is not 0: only rows as they are can be read", where=f"{module}.weight_format")
    return QuantTensor.from_codes(codes, largest[:, None] / _LARGEST_CODE, None, scheme)


def _check(module: str, suffix: str, tensor: torch.Tensor, count: int) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (count,):
        raise misfit(module, suffix, tensor, f"float32 [{count}]")
