"""Dense bf16 weights beside fp32 inputs: kept as stored, the compiled kernel for few rows and tiles for many."""

import pytest
import torch

from runtime.layers.dense import CompiledDense, DenseLinear
from runtime.layers.linear import make_linear
from runtime.native.library import library

pytestmark = pytest.mark.skipif(library().loaded is None, reason="needs gcc and torch with libgomp")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None, **settings: object) -> torch.nn.Module:
    return make_linear(weight, bias, numerics="fast", dtype=torch.float32, **settings)


@pytest.mark.parametrize("shape", [(128, 128), (1031, 16), (6, 4096), (333, 192)], ids=str)
def test_products_are_those_of_the_stored_weight(shape: tuple[int, int]) -> None:
    weight, bias = random(*shape).bfloat16(), random(shape[0], seed=1)
    layer = layer_of(weight, bias)
    assert isinstance(layer, CompiledDense)
    for rows in (1, 2, 3, 4, 5, 7, 31, 32, 70):
        x = random(rows, shape[1], seed=rows)
        wanted = x.double() @ weight.double().T + bias.double()
        assert float((layer(x) - wanted).norm() / wanted.norm()) < 2e-6


def test_the_weight_is_neither_copied_nor_widened() -> None:
    weight = random(256, 512).bfloat16()
    layer = layer_of(weight)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layer.bytes == 2 * weight.numel()


def test_tiles_cover_weights_larger_than_one() -> None:
    weight, x = random(3000, 1024).bfloat16(), random(40, 1024)
    torch.testing.assert_close(layer_of(weight)(x), x @ weight.float().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "weight",
    [
        random(128, 130).bfloat16(),
        random(16, 64).bfloat16(),
        random(2, 16384).bfloat16(),
        random(128, 128),
        random(128, 128).half(),
    ],
    ids=["width", "small", "rows", "fp32", "fp16"],
)
def test_other_weights_are_widened(weight: torch.Tensor) -> None:
    layer = layer_of(weight)
    assert isinstance(layer, DenseLinear) and layer.weight.dtype is torch.float32
    assert isinstance(layer_of(random(128, 128).bfloat16(), compiled=False), DenseLinear)


def test_no_row_depends_on_another() -> None:
    layer, x = layer_of(random(300, 256).bfloat16()), random(9, 256)
    clean = layer(x)
    x[1, 5] = float("nan")
    found, others = layer(x), torch.arange(9) != 1
    assert bool(found[1].isnan().all()) and torch.equal(found[others], clean[others])


def test_threads_do_not_change_bits() -> None:
    layer, x, before = layer_of(random(600, 256).bfloat16()), random(5, 256), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
