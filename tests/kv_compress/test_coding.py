"""Codes of keys and values against bounds that follow from the format, and against other libraries' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.core.errors import InputError, UsageError
from kv_compress._coding import code_dtype, encode, hadamard, round_trip
from kv_compress.fp8 import scale_for
from kv_compress.policy import CODECS, Coding, KVPolicy, LayerPolicy


def rows(width: int = 32, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(50, 3, width, generator=generator) * torch.logspace(-4, 4, 50)[:, None, None] + offset


def test_int8_is_within_half_a_step() -> None:
    x = rows()
    step = x.abs().amax(-1, keepdim=True) / 127
    error = (round_trip("int8", x) - x).abs()
    assert (error <= step * (0.5 + 127 * 2**-11) + 2**-25 * 127).all()  # half a step, and the scale's own rounding
    assert error.max() > 0.25 * step.max()


def test_int4_is_within_half_a_step_of_its_range() -> None:
    x = rows()
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    bound = step * (0.5 + 15 * 2**-11) + x.abs().amax(-1, keepdim=True) * 2**-11 + 2**-24
    assert ((round_trip("int4", x) - x).abs() <= bound).all()


def test_int4_puts_channels_half_a_head_apart_into_a_byte() -> None:
    x = torch.arange(16.0).reshape(1, 1, 16)
    codes, numbers = encode("int4", x)
    assert codes.flatten().tolist() == [low | (low + 8) << 4 for low in range(8)]
    assert numbers is not None
    assert numbers.flatten().tolist() == [1, 0]


def test_fp8_rounds_to_the_nearest_of_the_format() -> None:
    levels = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    grid = np.array(sorted({sign * level for level in levels[:-1] for sign in (1, -1)}))  # the last code is NaN
    x = rows(16) * 2.0**-4
    scale = torch.tensor([0.5, 2.0, 1.0])
    scaled = (x / scale[:, None]).clamp(-448, 448).numpy().astype(np.float64)
    error = np.abs(round_trip("fp8", x, scale).numpy() / scale[:, None].numpy() - scaled)
    nearest = np.abs(grid[np.clip(np.searchsorted(grid, scaled)[..., None] + [-1, 0], 0, len(grid) - 1)]
                     - scaled[..., None]).min(-1)  # fmt: skip
    assert np.allclose(error, nearest, rtol=1e-5, atol=1e-12)


def test_a_scale_of_fp8_is_the_least_power_of_two_that_clips_nothing() -> None:
    assert [scale_for(448), scale_for(448.1), scale_for(1.7), scale_for(0)] == [1, 2, 2.0**-8, 1]


@pytest.mark.parametrize("width", [1, 2, 16, 64])
def test_the_rotation_is_the_matrix_of_sylvester(width: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    x = rows(width)[20:30]
    assert np.allclose(hadamard(x).numpy(), x.numpy() @ matrix / width**0.5, atol=1e-5)


def test_a_rotation_tames_an_outlier() -> None:
    x = torch.randn(200, 1, 64, generator=torch.Generator().manual_seed(1))
    x[..., 7] += 100
    plain, turned = ((round_trip("int4", x, rotate=rotate) - x).square().mean() for rotate in (False, True))
    assert turned < 0.1 * plain


@pytest.mark.parametrize("codec", list(CODECS))
def test_bytes_are_those_of_the_tensors(codec: str) -> None:
    codes, numbers = encode(codec, rows(), torch.ones(1))
    stored = codes.nbytes + (0 if numbers is None else numbers.nbytes)
    assert codes.dtype is code_dtype(codec)
    assert stored == 150 * CODECS[codec].row_bytes(32)


@pytest.mark.parametrize("codec", list(CODECS))
def test_nothing_is_made_of_zeros_and_a_nan_stays(codec: str) -> None:
    x = torch.zeros(2, 1, 8)
    assert torch.equal(round_trip(codec, x, torch.ones(1)), x)
    x[1, 0, 3] = torch.nan
    seen = round_trip(codec, x, torch.ones(1))
    assert seen[1, 0, 3].isnan()
    assert torch.equal(seen[0], x[0])


def test_a_policy_survives_its_file() -> None:
    mixed = LayerPolicy(Coding("int4", rotate=True), Coding("fp8", scale=(0.5, 2.0)))
    policy = KVPolicy((LayerPolicy(), mixed, LayerPolicy(Coding("int8"))))
    assert KVPolicy.parse(policy.to_json()) == policy
    assert policy.codecs == ("full", "int8", "int4", "fp8")
    assert mixed.token_bytes(heads=2, width=16, itemsize=4) == 2 * (8 + 4 + 16)
    policy.require_fits([(2, 16)] * 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "is no policy"),
        ({"layers": [{"keys": {"codec": "int8"}}]}, "not its keys and values"),
        ({"layers": [{"keys": {"codec": "int3"}, "values": {"codec": "full"}}]}, "not a codec"),
        ({"layers": [{"keys": {"codec": "fp8"}, "values": {"codec": "full"}}]}, "not a codec"),
        ({"layers": [{"keys": {"codec": "fp8", "scale": [-1]}, "values": {"codec": "full"}}]}, "not a codec"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(data: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        KVPolicy.parse(data)


def test_a_policy_for_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="has 2 layers, the model 3"):
        KVPolicy.uniform("int8", 2).require_fits([(2, 16)] * 3)
    with pytest.raises(InputError, match="no power of two"):
        KVPolicy.uniform("int8", 1, rotate=True).require_fits([(2, 24)])
    with pytest.raises(InputError, match="2 scales for 3 heads"):
        KVPolicy((LayerPolicy(Coding("fp8", scale=(1.0, 1.0))),)).require_fits([(3, 16)])
    with pytest.raises(UsageError, match="'int2'"):
        KVPolicy.uniform("int2", 1)
