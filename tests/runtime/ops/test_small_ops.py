"""KV store, rotary, norm and low-bit products in torch, against formulas written out here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime.native.library import library
from runtime.ops.backend import torch_only, uses_triton
from runtime.ops.kv_store import store_kv
from runtime.ops.low_bit import low_bit_matmul
from runtime.ops.norm import rms_norm
from runtime.ops.rotary import apply_rotary


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["torch", "compiled"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways that an operation has on a CPU."""
    if request.param == "torch":
        with torch_only():
            yield
    else:
        if shutil.which("gcc") is None:
            pytest.skip("needs a C compiler")
        assert library().loaded is not None, library().reason
        yield


def test_store_writes_these_slots_and_no_other() -> None:
    k, v = random(3, 2, 8), random(3, 2, 8, seed=1)
    k_pool, v_pool = torch.zeros(5, 4, 2, 8, dtype=torch.bfloat16), torch.zeros(5, 4, 2, 8, dtype=torch.bfloat16)
    store_kv(k, v, k_pool, v_pool, torch.tensor([7, 0, 19]))
    for pool, rows in ((k_pool, k), (v_pool, v)):
        assert torch.equal(pool[1, 3], rows[0].bfloat16())
        assert torch.equal(pool[0, 0], rows[1].bfloat16())
        assert torch.equal(pool[4, 3], rows[2].bfloat16())
        assert pool.count_nonzero() == rows.numel()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("rotated", [16, 8, 2])
def test_rotary_turns_pairs_by_their_angle(rotated: int, strided: bool) -> None:
    q, k = random(5, 7, 16)[:, 1:].split([4, 2], dim=1) if strided else (random(5, 4, 16), random(5, 2, 16, seed=1))
    angle = random(5, rotated // 2, seed=2)
    cos, sin = (torch.cat([wave, wave], -1) for wave in (angle.cos(), angle.sin()))
    for before, after in zip((q, k), apply_rotary(q, k, cos, sin), strict=True):
        pair = torch.complex(before[..., : rotated // 2], before[..., rotated // 2 : rotated])
        turned = pair * torch.exp(1j * angle)[:, None]
        assert torch.allclose(after[..., :rotated], torch.cat([turned.real, turned.imag], -1), atol=1e-6)
        assert torch.equal(after[..., rotated:], before[..., rotated:])


@pytest.mark.usefixtures("way")
def test_norm_takes_strided_rows() -> None:
    x, weight = random(6, 5, 32), random(2, 32).T.contiguous().T[0]
    assert torch.equal(rms_norm(x[:, 1:3], weight, 1e-6), rms_norm(x[:, 1:3].clone(), weight.clone(), 1e-6))


@pytest.mark.usefixtures("way")
def test_rotary_keeps_the_dtype() -> None:
    q = random(2, 1, 8).bfloat16()
    wave = random(2, 8)
    assert all(out.dtype == torch.bfloat16 for out in apply_rotary(q, q, wave, wave))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (7, 100), (3, 4, 24), (200, 999)])
def test_norm_is_its_formula(shape: tuple[int, ...], plus_one: bool) -> None:
    x, weight = random(*shape).mul(3), random(shape[-1], seed=1)
    factor = 1 + weight if plus_one else weight
    wanted = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * factor.double()
    assert (rms_norm(x, weight, 1e-3, plus_one) - wanted).abs().max() < 3e-6


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", [48, 571, 4096])
def test_a_row_is_normalised_the_same_in_any_batch(width: int) -> None:
    x, weight = random(33, width), random(width, seed=1)
    together = rms_norm(x, weight, 1e-6)
    for rows in (1, 2, 8, 31):
        assert torch.equal(rms_norm(x[:rows].clone(), weight, 1e-6), together[:rows])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("plus_one", [False, True])
def test_norm_rounds_like_the_published_models(plus_one: bool) -> None:
    """bf16: Llama rounds before the weight, Gemma after it."""
    x, weight = random(4, 64).bfloat16(), random(64, seed=1).bfloat16()
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    wanted = (normal * (1 + weight.float())).bfloat16() if plus_one else weight * normal.bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6, plus_one), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_low_bit_product_is_the_dense_one(bits: int, group_size: int, symmetric: bool) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    outputs, inputs = 1100, 96  # more outputs than are dense at once
    groups = scheme.groups_in(inputs)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (outputs, inputs), generator=generator, dtype=torch.int8)
    zero = None if symmetric else torch.randint(-2, 2, (outputs, groups), generator=generator, dtype=torch.int8)
    scale = random(outputs, groups)
    weight = QuantTensor.from_codes(codes, scale, zero, scheme)
    size = inputs if group_size == -1 else group_size
    dense = codes.double()
    for channel in range(inputs):
        offset = 0 if zero is None else zero[:, channel // size].double()
        dense[:, channel] = (dense[:, channel] - offset) * scale[:, channel // size].double()
    x = random(5, inputs)
    assert torch.allclose(low_bit_matmul(x, weight).double(), x.double() @ dense.T, rtol=1e-4, atol=1e-3)


def test_kernels_are_for_gpus_and_can_be_switched_off() -> None:
    assert not uses_triton(torch.zeros(1))
    with torch_only():
        assert not uses_triton(torch.zeros(1))
