"""How one tensor of a model becomes one of GGUF: codes carried over, floats as they are, or weights rounded.

Nothing is read before a tensor's turn comes. `rows` gives the order of output channels that llama.cpp wants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.core.errors import InputError
from compress.core.formats import _gguf_blocks as blocks
from compress.core.formats._gguf_container import Tensor
from compress.core.formats._gguf_types import BF16, F16, F32, Q4_0, Q8_0, BlockType
from compress.core.tensors import QuantTensor, spread

_BLOCK = 32
_FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
_CODES = (-128, 127)


class Inexact(InputError):
    """A quantized weight that no type of GGUF holds exactly, though one nearly does."""


def nearest_type(tensor: QuantTensor) -> BlockType:
    """The smallest type that holds these codes; InputError if none does."""
    scheme, width = tensor.scheme, tensor.shape[1]
    size = scheme.group_width(width)
    if scheme.dtype != "int" or scheme.activation_bits != 16 or size % _BLOCK or width % size:
        raise InputError(f"{scheme.name} in groups of {size} does not fit the blocks of gguf")
    if scheme.symmetric:
        return Q4_0 if scheme.bits <= 4 else Q8_0
    codes = _centred(tensor)
    if int(codes.min()) < _CODES[0] or int(codes.max()) > _CODES[1]:
        raise Inexact("its codes less their zero points need more than 8 bits")
    return Q8_0


def require_exact(tensor: QuantTensor) -> None:
    """Inexact if fp16, in which GGUF stores scales, does not hold those of this weight."""
    if not torch.equal(tensor.scale.to(torch.float16).float(), tensor.scale.float()):
        raise Inexact("its scales are not exact in fp16, in which gguf stores them")


def _centred(tensor: QuantTensor) -> torch.Tensor:
    """Codes less zero points, int16 [O, K]: the weight is this times the scale."""
    codes = tensor.codes().to(torch.int16)
    if tensor.zero is None:
        return codes
    return codes - spread(tensor.zero.to(torch.int16), tensor.scheme.group_size, tensor.shape[1])


def carried(
    name: str, shape: tuple[int, int], type: BlockType, load: Callable[[], QuantTensor], rows: torch.Tensor | None
) -> Tensor:
    """Codes as they are, under the type that `nearest_type` gave, with scales in fp16."""

    def produce() -> memoryview:
        tensor = load()
        size = tensor.scheme.group_width(shape[1])
        scale = tensor.scale.to(torch.float16).repeat_interleave(size // _BLOCK, dim=1)
        return _bytes(_ordered(blocks.from_codes(_centred(tensor), scale, type), rows))

    return Tensor(name, type, shape, produce)


def floats(name: str, tensor: torch.Tensor, rows: torch.Tensor | None) -> Tensor:
    """A dense tensor in its dtype; vectors (norms, biases) in fp32."""
    if tensor.dtype not in _FLOATS:
        raise InputError(f"is of type {tensor.dtype}, which is not written as gguf", where=name)
    wanted = torch.float32 if tensor.dim() < 2 else tensor.dtype
    return Tensor(name, _FLOATS[wanted], tuple(tensor.shape), lambda: _bytes(_ordered(tensor.to(wanted), rows)))


def rounded(
    name: str, shape: tuple[int, int], type: BlockType, load: Callable[[], torch.Tensor], rows: torch.Tensor | None
) -> Tensor:
    """A matrix rounded to `type`."""
    return Tensor(name, type, shape, lambda: _bytes(_ordered(blocks.quantize(load().float(), type), rows)))


def _ordered(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values if rows is None else values[rows]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
