"""bitsandbytes on disk, as transformers writes it. Read: NF4 and FP4 with plain or quantized statistics, and int8.
Written: NF4 with plain or quantized statistics.

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
from compress.core.formats._checks import exact_as, misfit, usual_scheme
from compress.core.levels import table
from compress.core.nested_scales import NESTED_BLOCK, NestedScales
from compress.core.safetensors_io import TensorInfo, load_tensor
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor

OPTIONAL = (".weight.nested_absmax", ".weight.nested_quant_map", ".weight_format")
_WHERE = "config.json: quantization_config"
_BLOCK = 64  # transformers leaves it at this; what the file says wins
_NESTED_LEVELS = 256
_LONGEST_NUMBER = 24  # of an fp32 number in JSON
_CODES_PER_BYTE = 2
_MAP_BYTES = 16 * 4
_LARGEST_CODE = 127
_STATE_LIMIT_BYTES = 1 << 16
_LARGEST_SIDE = 1 << 40
_LARGEST_NUMBER = torch.finfo(torch.float32).max
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FOUR_BIT_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


@dataclass(frozen=True, slots=True)
class State:
    """What the JSON beside a 4-bit weight says. `offset` None: statistics are not quantized themselves."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float | None
    dtype: torch.dtype


def encode(module: str, tensor: QuantTensor) -> dict[str, torch.Tensor]:
    """Tensors of one nf4 module by disk name. The dtype that readers dequantize it to is that of its scales, as they
    were before they were quantized themselves."""
    scheme, nested = tensor.scheme, tensor.nested
    if scheme.double_quantization and nested is None:
        raise ArtifactError("has numbers for scales where their codes are needed", where=module)
    low_first = tensor.packed.contiguous().view(torch.uint8).reshape(-1, 1)
    parts = {
        "weight": (low_first << 4) | (low_first >> 4),
        "weight.absmax": tensor.scale.float().reshape(-1) if nested is None else nested.codes.reshape(-1),
        "weight.quant_map": table(scheme.dtype).clone(),
    }
    if nested is not None:
        parts |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.levels.clone()}
    dtype = tensor.scale.dtype if nested is None else nested.dtype
    state = bytearray(_described(tensor.shape, scheme, dtype, nested))
    parts[_state_part(scheme)] = torch.frombuffer(state, dtype=torch.uint8)
    return {f"{module}.{suffix}": part for suffix, part in parts.items()}


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of nf4 weights; `unquantized` stay as they are."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": usual_scheme(schemes).dtype,
        "bnb_4bit_use_double_quant": usual_scheme(schemes).double_quantization,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(unquantized),
    }


def encoded_bytes(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Exact bytes of all tensors that `encode` gives for a weight [out, in] of `shape`, headers apart."""
    rows, width = shape
    blocks = rows * scheme.groups_in(width)
    statistics = 4 * blocks
    if scheme.double_quantization:
        statistics = blocks + 4 * (-(-blocks // NESTED_BLOCK) + _NESTED_LEVELS)
    described = _described(shape, scheme, scale_dtype)
    return rows * width // _CODES_PER_BYTE + statistics + _MAP_BYTES + len(described)


def _described(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, nested: NestedScales | None = None) -> bytes:
    """The JSON beside a weight, as long whatever the offset of nested statistics is: blanks follow it."""
    state: dict[str, Any] = {
        "quant_type": scheme.dtype,
        "blocksize": scheme.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if not scheme.double_quantization:
        return json.dumps(state).encode()
    block, offset = (NESTED_BLOCK, 0.0) if nested is None else (nested.block, nested.offset)
    state |= {"nested_blocksize": block, "nested_dtype": "float32", "nested_offset": offset}
    blanks = _LONGEST_NUMBER - len(json.dumps(offset))
    return (json.dumps(state) + " " * blanks).encode()


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
    return Scheme(4, _BLOCK, dtype=kind, double_quantization=config.get("bnb_4bit_use_double_quant") is True)


def decode(module: str, read: Read, scheme: Scheme) -> QuantTensor:
    """Codes and scales as stored. NotKept if blocks straddle rows: such a weight can only be dequantized."""
    if scheme.dtype == "int":
        return _int8(module, read, scheme)
    state, packed, statistics = _four_bit(module, read, scheme)
    rows, width = state.shape
    if width % state.block:
        raise NotKept(
            f"blocks of {state.block} straddle its rows of {width}: the weight can only be dequantized",
            where=f"{module}.weight",
        )
    low_first = (packed << 4) | (packed >> 4)
    words_OW = low_first.view(rows, width // _CODES_PER_BYTE).view(torch.int32)
    blocks = (rows, width // state.block)
    scheme = replace(scheme, group_size=state.block, double_quantization=state.offset is not None)
    if isinstance(statistics, torch.Tensor):
        scale_OG = exact_as(statistics, state.dtype).view(blocks)
        return QuantTensor(words_OW, scale_OG, None, scheme, state.shape)
    nested = replace(statistics, codes=statistics.codes.view(blocks))
    return QuantTensor(words_OW, nested.numbers(), None, scheme, state.shape, nested)


def dequantize(module: str, read: Read, scheme: Scheme, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The module's weight [out, in], computed in fp32 and rounded once to `dtype`."""
    if scheme.dtype == "int":
        return _int8(module, read, scheme).dequantize(dtype)
    state, packed, statistics = _four_bit(module, read, scheme)
    absmax_B = statistics if isinstance(statistics, torch.Tensor) else statistics.numbers()
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
    shape, block, nested = data.get("shape"), data.get("blocksize"), data.get("nested_blocksize", NESTED_BLOCK)
    if not isinstance(shape, list) or len(shape) != 2 or not all(_positive(side) for side in shape):
        raise ArtifactError(f"shape {shape!r} is not that of a matrix", where=where)
    if not _positive(block) or not _positive(nested):
        raise ArtifactError(f"blocks of {block!r} and {nested!r} make no sense", where=where)
    offset = data.get("nested_offset")
    if offset is not None and not (isinstance(offset, int | float) and abs(offset) <= _LARGEST_NUMBER):
        raise ArtifactError(f"nested_offset {offset!r} is not a number", where=where)
    return State((shape[0], shape[1]), block, nested, offset, _DTYPES.get(str(data.get("dtype")), torch.float32))


def _positive(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= _LARGEST_SIDE


def _state_part(scheme: Scheme) -> str:
    return f"weight.quant_state.bitsandbytes__{scheme.dtype}"


def _four_bit(module: str, read: Read, scheme: Scheme) -> tuple[State, torch.Tensor, torch.Tensor | NestedScales]:
    """(state, bytes [O*K/2], largest magnitude of each block, fp32 [B] or codes [B])."""
    state = state_of(module, scheme, read)
    count = state.shape[0] * state.shape[1]
    packed = read(f"{module}.weight")
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // _CODES_PER_BYTE):
        raise misfit(module, "weight", packed, f"uint8 [{-(-count // _CODES_PER_BYTE)}, 1]")
    levels = read(f"{module}.weight.quant_map")
    if levels.dtype != torch.float32 or not torch.equal(levels, table(scheme.dtype)):
        raise ArtifactError(f"is not the table of {scheme.dtype}", where=f"{module}.weight.quant_map")
    return state, packed.reshape(-1), _statistics(module, read, state, -(-count // state.block))


def _statistics(module: str, read: Read, state: State, blocks: int) -> torch.Tensor | NestedScales:
    """Largest magnitude of each of the blocks: fp32 numbers, or codes where they are quantized themselves."""
    absmax_B = read(f"{module}.weight.absmax")
    wanted = torch.float32 if state.offset is None else torch.uint8
    if absmax_B.dtype != wanted or tuple(absmax_B.shape) != (blocks,):
        raise misfit(module, "weight.absmax", absmax_B, f"{str(wanted).removeprefix('torch.')} [{blocks}]")
    if state.offset is None:
        return absmax_B
    nested, levels = read(f"{module}.weight.nested_absmax"), read(f"{module}.weight.nested_quant_map")
    _check(module, "weight.nested_absmax", nested, -(-blocks // state.nested_block))
    _check(module, "weight.nested_quant_map", levels, _NESTED_LEVELS)
    return NestedScales(absmax_B, nested, levels, state.offset, state.dtype, state.nested_block)


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
