"""Packing: golden words, every width of code, ragged rows."""

import pytest
import torch

from compress.core import tensors
from compress.core.errors import ArtifactError
from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor, pack_rows, spread, unpack_rows, words_in

GENERATOR_SEED = 5


def words(codes: list[int], bits: int) -> list[int]:
    packed = pack_rows(torch.tensor([codes], dtype=torch.uint8), bits)
    return [word & 0xFFFFFFFF for word in packed[0].tolist()]


def test_golden_words() -> None:
    assert words([code + 8 for code in (-8, -7, -1, 0, 1, 2, 6, 7)], 4) == [0xFEA98710]
    assert words([code + 128 for code in (-128, -1, 0, 127)], 8) == [0xFF807F00]
    assert words([code + 2 for code in (-2, -1, 0, 1)] * 4, 2) == [0xE4E4E4E4]
    assert words([i % 8 for i in range(32)], 3) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 7, 31, 32, 33, 100, 257])
def test_unpacking_inverts_packing(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    codes = torch.randint(0, 1 << bits, (3, width), generator=generator, dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (3, words_in(width, bits))
    assert torch.equal(unpack_rows(packed, bits, width), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_stream_is_least_significant_bit_first(bits: int) -> None:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    codes = torch.randint(0, 1 << bits, (1, 45), generator=generator, dtype=torch.uint8)
    stream = sum(code << (i * bits) for i, code in enumerate(codes[0].tolist()))
    expected = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(words_in(45, bits))]
    assert [word & 0xFFFFFFFF for word in pack_rows(codes, bits)[0].tolist()] == expected


def test_single_columns_with_odd_strides() -> None:
    codes = torch.tensor([[3, 0, 2]], dtype=torch.uint8).t().contiguous()
    packed = pack_rows(codes, 2)
    assert torch.equal(unpack_rows(packed.t().contiguous().t(), 2, 1), codes)


def test_dequantize_follows_the_definition() -> None:
    scheme = Scheme(4, group_size=4, symmetric=False)
    codes = torch.tensor([[-8, 7, 0, 3, -1, 2]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 0.25]])
    zero = torch.tensor([[1, -2]], dtype=torch.int8)
    tensor = QuantTensor.from_codes(codes, scale, zero, scheme)
    assert torch.equal(tensor.codes(), codes)
    assert tensor.dequantize().tolist() == [[-4.5, 3.0, -0.5, 1.0, 0.25, 1.0]]
    assert tensor.bytes == 4 + 8 + 2


def test_spread_cuts_the_ragged_tail() -> None:
    assert spread(torch.tensor([[1.0, 2.0]]), 4, 6).tolist() == [[1, 1, 1, 1, 2, 2]]
    assert spread(torch.tensor([[3.0]]), -1, 3).tolist() == [[3, 3, 3]]


@pytest.mark.parametrize(
    ("packed", "scale", "zero", "names"),
    [
        ((2, 3), (2, 2), None, "packed codes"),
        ((2, 2), (2, 1), None, "scales"),
        ((2, 2), (2, 2), (2, 2), "zero points"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    packed: tuple[int, int], scale: tuple[int, int], zero: tuple[int, int] | None, names: str
) -> None:
    with pytest.raises(ArtifactError, match=names):
        QuantTensor(
            torch.zeros(packed, dtype=torch.int32),
            torch.ones(scale),
            None if zero is None else torch.zeros(zero, dtype=torch.int8),
            Scheme(4, group_size=8),
            (2, 16),
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_stack_to_the_whole(symmetric: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    whole = fit_grid(weight, scheme, scale_dtype=torch.bfloat16).round(weight)
    stacked = QuantTensor.stack([whole.rows(0, 7), whole.rows(7, 48), whole.rows(48, 50)])
    assert stacked.shape == whole.shape and torch.equal(stacked.dequantize(), whole.dequantize())


def test_a_large_weight_is_dequantized_in_pieces_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    tensor = fit_grid(weight, Scheme(3, 32, symmetric=False), scale_dtype=torch.bfloat16).round(weight)
    whole = tensor.dequantize(torch.bfloat16)
    monkeypatch.setattr(tensors, "_DEQUANTIZED_AT_ONCE", 96 * 7)
    assert torch.equal(tensor.dequantize(torch.bfloat16), whole)
