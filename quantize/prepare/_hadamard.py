"""Randomized Hadamard matrices of many sizes, and products with them.

A Hadamard matrix of size m·2^k is a Kronecker product of one of size m and k of size 2. Those of size m here are
Paley's (1933): m = q + 1 for a prime q = 3 mod 4, m = 2 (q + 1) for a prime q = 1 mod 4. Suffix: N the rotated axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_LARGEST_POWER = 64  # factors of two are joined to matrices of at most this size
_SMALLEST_BLOCK = 8


@dataclass(frozen=True)
class Rotation:
    """x -> x Q along the last axis, Q = diag(signs) H / sqrt(size) orthogonal. Sizes without a known Hadamard matrix
    are turned in `blocks` equal parts."""

    signs_N: Tensor
    blocks: int
    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, size: int, generator: torch.Generator) -> Rotation | None:
        """A rotation of `size` channels with random signs; None if no part of at least 8 channels can be turned."""
        signs_N = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
        for part in range(size, _SMALLEST_BLOCK - 1, -1):
            factors = factors_of(part) if size % part == 0 else None
            if factors is not None:
                return cls(signs_N, size // part, factors)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """x Q, fp32, along the last axis."""
        y = (x.float() * self.signs_N.to(x.device)).reshape(-1, self.blocks, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, start=2):
            y = (y.movedim(axis, -1) @ factor.to(x.device)).movedim(-1, axis)
        return y.reshape(x.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Qᵀ x: along the first axis."""
        return self(x.movedim(0, -1)).movedim(-1, 0).contiguous()


def factors_of(size: int) -> tuple[Tensor, ...] | None:
    """Orthogonal matrices whose Kronecker product is a Hadamard matrix over sqrt(size); None if none is known."""
    odd = size // (size & -size)
    base = odd
    while base <= size:
        matrix = paley(base)
        if matrix is not None:
            powers = _powers_of_two(size // base)
            return tuple(factor / math.sqrt(len(factor)) for factor in (matrix, *powers) if len(factor) > 1)
        base *= 2
    return None


def _powers_of_two(size: int) -> list[Tensor]:
    found = []
    while size > 1:
        part = min(size, _LARGEST_POWER)
        found.append(_sylvester(part))
        size //= part
    return found


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix


@cache
def paley(size: int) -> Tensor | None:
    """Paley's Hadamard matrix of `size`, entries ±1; None if he has none (prime powers left out)."""
    if size <= 2:
        return _sylvester(size)
    if size % 4:
        return None
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        return torch.eye(size) + _bordered(size - 1, symmetric=False)
    if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        conference = _bordered(size // 2 - 1, symmetric=True)
        rest = torch.kron(torch.eye(size // 2), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
        return torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + rest
    return None


def _bordered(prime: int, *, symmetric: bool) -> Tensor:
    """Whether i - j is a square modulo `prime` (±1), with a border of ones; zeros on the diagonal."""
    is_square = torch.full((prime,), -1.0)
    is_square[torch.arange(1, prime).square() % prime] = 1.0
    is_square[0] = 0.0
    place = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[1:, 1:] = is_square[(place[:, None] - place) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0 if symmetric else -1.0
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
