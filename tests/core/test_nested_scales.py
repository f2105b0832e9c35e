"""Double quantization against bitsandbytes: its levels, blocks and offset; and codes that are never farther off."""

import pytest
import torch
from bitsandbytes import functional

from compress.core.errors import ArtifactError, UsageError
from compress.core.grid import fit_grid
from compress.core.levels import dynamic, nearest
from compress.core.nested_scales import nest
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor

NF4 = Scheme(4, 64, dtype="nf4")


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    make = torch.Generator().manual_seed(shape[0])
    found = torch.randn(shape, generator=make) * torch.rand(shape[0], 1, generator=make)
    found.view(-1)[64:128] = 0  # a block without a scale
    found[3, 5] = 40.0
    return found.to(dtype)


def tensor_of(weight: torch.Tensor) -> QuantTensor:
    return fit_grid(weight.float(), NF4, scale_dtype=weight.dtype).round(weight)


def test_the_levels_are_those_of_the_library() -> None:
    assert torch.equal(dynamic(), functional.create_dynamic_map())


def test_the_nearest_level() -> None:
    numbers = torch.linspace(-1.1, 1.1, 4001)
    wanted = (numbers[:, None] - dynamic()).abs().amin(-1)
    assert torch.equal((numbers - dynamic()[nearest(numbers, dynamic()).int()]).abs(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 128), (512, 256), (300, 64)], ids=str)
def test_it_is_what_the_library_makes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    original = weight(shape, dtype)
    _, state = functional.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
    tensor = tensor_of(original)
    nested = nest(tensor.scale)
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.levels, state.state2.code)
    assert nested.offset == state.offset.item() and nested.dtype == dtype
    # The library looks codes up in a table of 65536 numbers on CPUs, so that those between two levels may differ.
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours, scale = nested.numbers().view(-1), tensor.scale.float().view(-1)
    assert int((nested.codes.view(-1) != state.absmax).sum()) <= 1 + 0.02 * len(scale)
    slack = 1e-6 * scale.max()
    assert bool(((ours - scale).abs() <= (theirs - scale).abs() + slack).all())


def test_the_numbers_are_what_the_library_makes_of_the_codes() -> None:
    nested = nest(tensor_of(weight((512, 256))).scale)
    state = functional.QuantState(absmax=nested.absmax, code=nested.levels, blocksize=256, dtype=torch.float32)
    theirs = functional.dequantize_blockwise(nested.codes.view(-1), state) + nested.offset
    assert torch.equal(nested.numbers().view(-1), theirs)


def test_a_tensor_with_nested_scales() -> None:
    plain = tensor_of(weight((24, 128), torch.bfloat16))
    tensor = plain.with_nested_scales()
    assert tensor.scheme == Scheme(4, 64, dtype="nf4", double_quantization=True)
    assert tensor.nested is not None and torch.equal(tensor.scale, tensor.nested.numbers())
    assert torch.equal(tensor.stored(), plain.stored())
    part = tensor.rows(3, 9)
    assert part.nested is None and torch.equal(part.dequantize(), tensor.dequantize()[3:9])
    moved = tensor.to("cpu")
    assert moved.nested is not None and torch.equal(moved.dequantize(), tensor.dequantize())
    with pytest.raises(ArtifactError, match="double quantization"):
        QuantTensor(plain.packed, plain.scale, None, NF4, plain.shape, tensor.nested)
    with pytest.raises(UsageError, match="double quantization is of nf4 and fp4, not of int"):
        Scheme(4, 64, double_quantization=True)
