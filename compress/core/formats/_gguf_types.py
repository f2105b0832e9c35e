"""The tensor types of GGUF that are written here: their number in the file, weights and bytes of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """`weights` neighbours of a row share a block of `bytes_each`. `file_type` is how llama.cpp calls such a file."""

    name: str
    id: int
    weights: int
    bytes_each: int
    file_type: int

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.weights * self.bytes_each


F32 = BlockType("f32", 0, 1, 4, 0)
F16 = BlockType("f16", 1, 1, 2, 1)
Q4_0 = BlockType("q4_0", 2, 32, 18, 2)
Q8_0 = BlockType("q8_0", 8, 32, 34, 7)
Q4_K = BlockType("q4_k", 12, 256, 144, 14)
Q6_K = BlockType("q6_k", 14, 256, 210, 18)
BF16 = BlockType("bf16", 30, 1, 2, 32)

TYPES = {type.id: type for type in (F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16)}
BY_NAME = {type.name: type for type in TYPES.values()}
