"""What the writers of GPTQ and AWQ write means the same weights: to our reader, to the second decoder, by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import ArtifactError
from compress.core.formats import WRITABLE, _reference, awq, gptq, reader_for, writer_for
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from tests.quantized_folders import quantize_weight

ROWS, WIDTH = 64, 128


def random_tensor(scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> QuantTensor:
    """Codes and zero points over their whole range, scales of both signs."""
    make = torch.Generator().manual_seed(scheme.bits)
    groups = scheme.groups_in(WIDTH)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (ROWS, WIDTH), generator=make, dtype=torch.int8)
    scale = ((torch.rand(ROWS, groups, generator=make) - 0.5) / 8).to(scale_dtype)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(scheme.lowest, scheme.highest + 1, (ROWS, groups), generator=make, dtype=torch.int8)
    return QuantTensor.from_codes(codes, scale, zero, scheme)


def nf4_tensor(dtype: torch.dtype, *, double: bool) -> QuantTensor:
    make = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, WIDTH), generator=make, dtype=torch.uint8)
    scale = torch.rand(ROWS, WIDTH // 64, generator=make).to(dtype)
    tensor = QuantTensor.from_stored(codes, scale, None, Scheme(4, 64, dtype="nf4"))
    return tensor.with_nested_scales() if double else tensor


def read_back(tmp_path: Path, format: str, tensor: QuantTensor) -> None:
    """Both decoders give the weight of `tensor`, bit for bit, from what the writer wrote."""
    writer = writer_for(format)
    tensors = writer.encode("m", tensor)
    reader = reader_for({"quantization_config": writer.quantization_config({"m": tensor.scheme}, ["lm_head"])})
    scheme = reader.modules(tensors)["m"]
    assert {name for name in reader.stored_names("m", scheme) if not reader.may_lack(name)} <= set(tensors)
    wanted = tensor.dequantize()
    assert torch.equal(reader.decode("m", tensors.__getitem__, scheme).dequantize(), wanted)
    save_file(tensors, tmp_path / "m.safetensors")
    from compress.core.safetensors_io import read_header

    infos = read_header(tmp_path / "m.safetensors")
    assert reader.shape_of("m", scheme, infos) == tensor.shape
    again = _reference.weights(reader, "m", infos, scheme, np.arange(ROWS))
    assert np.array_equal(again, wanted.numpy())
    scale_dtype = tensors["m.scales"].dtype if "m.scales" in tensors else tensor.scale.dtype
    scale_dtype = tensor.nested.dtype if tensor.nested is not None else scale_dtype
    assert writer.encoded_bytes(tensor.shape, tensor.scheme, scale_dtype) == sum(info.bytes for info in infos.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_gptq_is_read_back(tmp_path: Path, bits: int, size: int) -> None:
    read_back(tmp_path, "gptq", random_tensor(Scheme(bits, size)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_awq_is_read_back(tmp_path: Path, size: int, symmetric: bool) -> None:
    read_back(tmp_path, "awq", random_tensor(Scheme(4, size, symmetric)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bitsandbytes_is_read_back(tmp_path: Path, dtype: torch.dtype, double: bool) -> None:
    tensor = nf4_tensor(dtype, double=double)
    read_back(tmp_path, "bitsandbytes", tensor)
    stored = writer_for("bitsandbytes").encode("m", tensor)
    assert json.loads(bytes(stored["m.weight.quant_state.bitsandbytes__nf4"].tolist()))["dtype"] in str(dtype)


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_reads_what_we_write(double: bool) -> None:
    """The library dequantizes our bytes to our numbers."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    tensor = nf4_tensor(torch.float32, double=double)
    stored = writer_for("bitsandbytes").encode("m", tensor)
    parts = {name.removeprefix("m."): value for name, value in stored.items() if name != "m.weight"}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(stored["m.weight"], state)
    assert torch.equal(theirs.float(), tensor.dequantize())


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_scales_that_half_precision_lacks_stay_as_they_are(tmp_path: Path, format: str) -> None:
    exact = writer_for(format).encode("m", random_tensor(Scheme(4, 32), torch.bfloat16))
    assert exact["m.scales"].dtype == torch.float16
    tensor = random_tensor(Scheme(4, 32), torch.float32)
    assert writer_for(format).encode("m", tensor)["m.scales"].dtype == torch.float32
    read_back(tmp_path, format, tensor)


def test_a_part_of_nested_scales_is_not_written() -> None:
    part = nf4_tensor(torch.float32, double=True).rows(0, 8)
    with pytest.raises(ArtifactError, match="numbers for scales"):
        writer_for("bitsandbytes").encode("m", part)


@pytest.mark.parametrize("offset", [0.0, 1e-38, 0.00012345679104328156, 2.599750518798828, 12345.6787109375])
def test_the_offset_of_nested_scales_changes_no_size(offset: float) -> None:
    tensor = nf4_tensor(torch.float32, double=True)
    assert tensor.nested is not None
    stored = writer_for("bitsandbytes").encode("m", replace(tensor, nested=replace(tensor.nested, offset=offset)))
    size = sum(part.nbytes for part in stored.values())
    assert size == writer_for("bitsandbytes").encoded_bytes(tensor.shape, tensor.scheme, torch.float32)
    assert json.loads(bytes(stored["m.weight.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"] == offset


def test_gptq_words_by_hand() -> None:
    """Version 1 stores the zero point 8 less one; input channels go up the words, from the lowest bits."""
    codes = torch.arange(-8, 8, dtype=torch.int8)[:, None].repeat(1, 16).T.contiguous()  # [16 out, 16 in]
    tensor = QuantTensor.from_codes(codes, torch.ones(16, 1), None, Scheme(4))
    stored = gptq.encode("m", tensor)
    assert [hex(word & 0xFFFFFFFF) for word in stored["m.qweight"][:, 0].tolist()] == ["0x76543210", "0xfedcba98"]
    assert {word & 0xFFFFFFFF for word in stored["m.qzeros"].flatten().tolist()} == {0x77777777}
    assert stored["m.g_idx"].tolist() == [0] * 16


def test_awq_words_by_hand() -> None:
    """Output channels 0 … 7 of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest nibble."""
    codes = torch.arange(-8, 0, dtype=torch.int8)[:, None].repeat(1, 32)
    stored = awq.encode("m", QuantTensor.from_codes(codes, torch.ones(8, 1), None, Scheme(4)))
    assert hex(int(stored["m.qweight"][0, 0])) == "0x75316420"
    assert hex(int(stored["m.qzeros"][0, 0]) & 0xFFFFFFFF) == "0x88888888"


def test_layers_that_differ_have_entries_of_their_own() -> None:
    schemes = {"model.layers.1.up": Scheme(4, 32), "model.layers.11.up": Scheme(4, 32), "a.down": Scheme(8, -1)}
    reader = reader_for({"quantization_config": gptq.quantization_config(schemes, ["a.dense", "lm_head"])})
    assert {module: reader.scheme_of(module) for module in schemes} == schemes
    assert reader.scheme_of("a.dense") is None
    assert reader.scheme_of("lm_head") is None
    assert reader.scheme_of("aXdown") == Scheme(4, 32), "names are no patterns"


@pytest.mark.parametrize("format", WRITABLE)
def test_every_writable_format_has_its_functions(format: str) -> None:
    writer = writer_for(format)
    assert all(callable(getattr(writer, name)) for name in ("encode", "quantization_config", "encoded_bytes"))


def test_fitted_weights_survive(tmp_path: Path) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    read_back(tmp_path, "gptq", quantize_weight(weight, Scheme(4, 32), torch.float16))
    read_back(tmp_path, "awq", quantize_weight(weight, Scheme(4, 32, symmetric=False), torch.float16))
