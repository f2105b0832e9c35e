"""Weights with zeros as a bitmap: nothing is lost, products are those of the dense weight, and no row sees another."""

from __future__ import annotations

import pytest
import torch

from runtime.layers.bitmap import BitmapLinear
from runtime.native.bitmap import described, expand, expand_reference, pack, takes_zeros
from runtime.native.library import library

pytestmark = pytest.mark.skipif(
    library().loaded is None or not library().loaded.bitmap_served(), reason="no AVX-512 VBMI2 or gcc here"
)
ROWS = (1, 2, 3, 4, 5, 7, 8, 17, 31, 32, 70, 130)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(rows: int, width: int, share: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (random(rows, width) * (torch.rand((rows, width), generator=generator) >= share)).bfloat16()


WEIGHTS = {
    "half": sparse(1031, 64),
    "most": sparse(333, 192, 0.9),
    "none": random(6, 4096).bfloat16(),
    "all": torch.zeros(5, 96).bfloat16(),
    "in runs": sparse(64, 320).index_fill(1, torch.arange(64, 200), 0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_is_lost(name: str) -> None:
    weight = WEIGHTS[name]
    packed, found = pack(weight), torch.full_like(weight, 7)
    assert len(packed.values_N) == int((weight != 0).sum()) + 32
    assert torch.equal(expand_reference(packed), weight)
    expand(described(packed), 0, len(weight), found)
    assert torch.equal(found, weight)
    found = found[:3].clone()
    expand(described(packed), 2, 5, found)
    assert torch.equal(found, weight[2:5])


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "no tiles"])
def test_products_are_those_of_the_dense_weight(name: str, tiles: bool) -> None:
    weight, bias = WEIGHTS[name], random(len(WEIGHTS[name]), seed=1)
    layer = BitmapLinear(weight, bias)
    layer._in_tiles &= tiles
    for rows in ROWS:
        x = random(rows, weight.shape[1], seed=rows)
        wanted = x.double() @ weight.double().T + bias.double()
        assert float((layer(x) - wanted).norm() / wanted.norm()) < 2e-6
        given = x.bfloat16()
        wanted = given.double() @ weight.double().T + bias.double()
        found = layer(given)
        assert found.dtype is torch.bfloat16
        assert float((found - wanted).norm() / wanted.norm()) < 4e-3


def test_half_zeros_take_nine_sixteenths_of_the_bytes() -> None:
    weight = random(256, 1024).view(-1, 4).index_fill(1, torch.tensor([1, 3]), 0).view(256, 1024).bfloat16()
    starts = 256 * 8 + 64
    assert BitmapLinear(weight, None).bytes == 2 * weight.numel() * 9 // 16 + starts


def test_tiles_cover_weights_larger_than_one() -> None:
    weight, x = sparse(3000, 1024), random(40, 1024)
    wanted = x @ weight.float().T
    torch.testing.assert_close(BitmapLinear(weight, None)(x), wanted, rtol=1e-4, atol=1e-3)


def test_minus_zero_is_zero_and_what_is_not_finite_stays() -> None:
    weight = sparse(8, 64)
    weight[0], weight[1, 5], weight[2, 6] = -0.0, float("nan"), float("inf")
    packed = pack(weight)
    assert int(packed.start_O[1]) == 0
    torch.testing.assert_close(expand_reference(packed), weight, rtol=0, atol=0, equal_nan=True)
    layer, x = BitmapLinear(sparse(8, 64), None), random(3, 64)
    x[1, 9] = float("inf")
    assert bool(layer(x)[1].isnan().any()), "an infinite input meets a zero, as in the dense product"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_depends_on_another(dtype: torch.dtype) -> None:
    layer, x = BitmapLinear(sparse(300, 256), None), random(9, 256).to(dtype)
    clean = layer(x)
    assert torch.equal(layer(x[4:5])[0], clean[4])
    x[1, 5] = float("nan")
    found, others = layer(x), torch.arange(9) != 1
    assert bool(found[1].isnan().all()) and torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    layer, x, before = BitmapLinear(sparse(600, 256), None), random(5, 256).to(dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "weight",
    [random(64, 48).bfloat16(), random(2, 64).bfloat16(), random(64, 64), random(64, 64).bfloat16().T],
    ids=["width", "rows", "fp32", "strides"],
)
def test_what_the_kernels_do_not_take(weight: torch.Tensor) -> None:
    assert not takes_zeros(weight)
