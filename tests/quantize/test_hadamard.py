"""Hadamard matrices of the sizes that models have, and the rotations made of them."""

from __future__ import annotations

import math

import pytest
import torch

from quantize.prepare._hadamard import Rotation, factors_of, paley


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 68, 76, 84])
def test_paleys_matrices_are_hadamard(size: int) -> None:
    matrix = paley(size)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


@pytest.mark.parametrize("size", [3, 6, 10, 92])
def test_what_has_no_such_matrix_gets_none(size: int) -> None:
    assert paley(size) is None


@pytest.mark.parametrize("size", [1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 8192])
def test_sizes_of_models_have_a_matrix(size: int) -> None:
    factors = factors_of(size)
    assert factors is not None and math.prod(len(factor) for factor in factors) == size


@pytest.mark.parametrize("size", [24, 64, 80, 96, 112, 128, 576, 896, 960])
def test_they_are_turned_whole(size: int) -> None:
    rotation = Rotation.of(size, torch.Generator().manual_seed(1))
    assert rotation is not None and rotation.blocks == 1
    matrix = rotation(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5), atol=1e-5, rtol=0)
    weight = torch.randn(size, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(rotation.rows(weight), matrix.T @ weight, atol=1e-4, rtol=1e-4)


def test_other_sizes_are_turned_in_parts_or_not_at_all() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = Rotation.of(8 * 23, generator)
    assert parts is not None and parts.blocks == 23
    matrix = parts(torch.eye(8 * 23))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    assert Rotation.of(4 * 23, generator) is None


def test_the_seed_decides_the_signs() -> None:
    one, same, other = (Rotation.of(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one is not None and same is not None and other is not None
    assert torch.equal(one.signs_N, same.signs_N) and not torch.equal(one.signs_N, other.signs_N)
