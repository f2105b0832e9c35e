"""bitsandbytes' own weights and whole models that transformers saved, read by both decoders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError
from compress.core.formats import NotKept, Reader, _reference, bitsandbytes, reader_for
from compress.core.inspect import inspect
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme
from compress.core.verify import verify
from tests.quantized_folders import tiny_llama

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def reader_of(kind: str = "nf4") -> Reader:
    return reader_for({"quantization_config": FOUR | {"bnb_4bit_quant_type": kind}})


def four_bit(kind: str, *, nested: bool, shape=(24, 128), block: int = 64):
    """(tensors, what the library says they mean)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.view(-1)[:64] = 0  # a block without a scale
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    parts = {f"m.weight.{name}": part.contiguous() for name, part in state.as_dict(packed=True).items()}
    state.shape = torch.Size([1, weight.numel()])  # with AVX-512, 0.50.2 errs where blocks straddle rows
    return {"m.weight": packed, **parts}, functional.dequantize_4bit(packed, state).view(shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(24, 128), (512, 64), (7, 192)], ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_both_decoders_read_the_librarys_weights(tmp_path: Path, kind, nested, shape, block) -> None:
    tensors, wanted = four_bit(kind, nested=nested, shape=shape, block=block)
    reader = reader_of(kind)
    assert reader.modules(tensors) == {"m": Scheme(4, 64, dtype=kind)}
    scheme = reader.scheme_of("m")
    weight = reader.dequantize("m", tensors.__getitem__, scheme, torch.float32)
    assert torch.equal(weight, wanted)
    if shape[1] % block == 0:
        kept = reader.decode("m", tensors.__getitem__, scheme)
        assert kept.scheme == Scheme(4, block, dtype=kind, double_quantization=nested)
        assert torch.equal(kept.dequantize(), wanted)
        again = bitsandbytes.encode("m", kept)
        assert again.keys() == tensors.keys()
        for name, part in again.items():
            if "quant_state" in name:  # blanks may follow
                assert json.loads(bytes(part.tolist())) == json.loads(bytes(tensors[name].tolist()))
            else:
                assert torch.equal(part, tensors[name])
    save_file(tensors, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors")
    assert reader.shape_of("m", scheme, infos) == shape
    again = _reference.weights(reader, "m", infos, scheme, np.arange(shape[0]))
    assert np.array_equal(again, weight.numpy())


def test_blocks_that_straddle_rows_can_be_dequantized_only() -> None:
    tensors, wanted = four_bit("nf4", nested=True, shape=(6, 40))
    reader = reader_of()
    scheme = reader.scheme_of("m")
    with pytest.raises(NotKept, match=r"m\.weight: blocks of 64 straddle its rows of 40"):
        reader.decode("m", tensors.__getitem__, scheme)
    assert torch.equal(reader.dequantize("m", tensors.__getitem__, scheme, torch.float32), wanted)


def int8_tensors() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    wanted = functional.int8_vectorwise_dequant(codes, largest)
    return {"m.weight": codes, "m.SCB": largest, "m.weight_format": torch.zeros((), dtype=torch.uint8)}, wanted


def test_int8_rows(tmp_path: Path) -> None:
    tensors, wanted = int8_tensors()
    reader = reader_for({"quantization_config": EIGHT})
    assert reader.modules(tensors) == {"m": Scheme(8)}
    kept = reader.decode("m", tensors.__getitem__, Scheme(8))
    torch.testing.assert_close(kept.dequantize(), wanted.float(), rtol=1e-6, atol=0)
    del tensors["m.weight_format"]
    assert torch.equal(reader.decode("m", tensors.__getitem__, Scheme(8)).packed, kept.packed)
    save_file(tensors, tmp_path / "m.safetensors")
    again = _reference.weights(reader, "m", read_header(tmp_path / "m.safetensors"), Scheme(8), np.arange(16))
    assert np.array_equal(again, kept.dequantize().numpy())


# ---------------------------------------------------------------------- whole models
@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_8bit": True}, "w8a16"),
    ],
)
def test_models_that_transformers_saved(tmp_path: Path, settings, scheme) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    options = {"quantization_config": BitsAndBytesConfig(**settings), "dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    model.save_pretrained(tmp_path / "small")
    report = verify(tmp_path / "small", source=tmp_path / "dense", library=True)
    library = next(check.detail for check in report.checks if check.name == "library")
    assert ("no 4-bit layers" if scheme == "w8a16" else "agrees on model.layers.0") in library
    assert report.ok, [check for check in report.checks if not check.ok]
    assert {"layers", "contents", "closeness"} <= {check.name for check in report.checks}
    found = inspect(tmp_path / "small")
    assert sum(count for name, count in found.schemes.items() if name.startswith(scheme)) == 14
    assert found.parameters == inspect(tmp_path / "dense").parameters
    assert found.engines
    checkpoint = Checkpoint.open(tmp_path / "small")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        ours, theirs = checkpoint.build_model(torch.float32)(ids).logits, model(ids).logits
    tolerance = 0.05 if scheme == "w8a16" else 1e-2  # LLM.int8() also rounds inputs; bf16 products where CPUs have them
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


# ---------------------------------------------------------------------- what is refused
def edited_state(**changes: object):
    def edit(value: torch.Tensor) -> torch.Tensor:
        data = json.loads(bytes(value.tolist())) | changes
        return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)

    return edit


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda value: value[1:], "m.weight"),
        ("weight", lambda value: value.to(torch.int8), "m.weight"),
        ("weight.absmax", lambda value: value[1:], "m.weight.absmax"),
        ("weight.absmax", lambda value: value.float(), "m.weight.absmax"),
        ("weight.quant_map", lambda value: value.flip(0), "not the table of nf4"),
        ("weight.nested_absmax", lambda value: value.double(), "m.weight.nested_absmax"),
        ("weight.nested_quant_map", lambda value: value[:9], "m.weight.nested_quant_map"),
        (STATE, lambda value: value[:-1], "is not JSON"),
        (STATE, lambda value: value.float(), STATE),
        (STATE, edited_state(quant_type="fp4"), "does not describe nf4"),
        (STATE, edited_state(shape=[24]), "shape"),
        (STATE, edited_state(shape=[24, -1]), "shape"),
        (STATE, edited_state(blocksize=0), "blocks of 0"),
        (STATE, edited_state(nested_offset="x"), "nested_offset"),
        (STATE, edited_state(nested_offset=float("nan")), "nested_offset"),
        (STATE, edited_state(nested_offset=10**60), "nested_offset"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, change, message: str) -> None:
    tensors, _ = four_bit("nf4", nested=True)
    tensors[f"m.{name}"] = change(tensors[f"m.{name}"])
    reader = reader_of()
    with pytest.raises(ArtifactError, match=message) as caught:
        reader.decode("m", tensors.__getitem__, reader.scheme_of("m"))
    assert str(caught.value.where).startswith("m.weight")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda value: value.float()),
        ("SCB", lambda value: value[1:]),
        ("SCB", lambda value: value.half()),
        ("weight_format", lambda value: value + 1),
    ],
)
def test_int8_tensors_that_do_not_fit_are_named(name: str, change) -> None:
    tensors, _ = int8_tensors()
    tensors[f"m.{name}"] = change(tensors[f"m.{name}"])
    reader = reader_for({"quantization_config": EIGHT})
    with pytest.raises(ArtifactError, match=f"m.{name}"):
        reader.decode("m", tensors.__getitem__, Scheme(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FOUR | {"load_in_8bit": True}, "or both"),
        ({"quant_method": "bitsandbytes"}, "neither"),
        (FOUR | {"bnb_4bit_quant_type": "af4"}, "'af4'"),
        (FOUR | {"bnb_4bit_quant_storage": "bfloat16"}, "'bfloat16'"),
    ],
)
def test_configs_that_are_not_read_are_named(settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader_for({"quantization_config": settings}).scheme_of("m")


def test_a_missing_part_is_named_by_verify(tmp_path: Path) -> None:
    tensors, _ = four_bit("nf4", nested=True)
    del tensors["m.weight.nested_absmax"]
    reader = reader_of()
    with pytest.raises((ArtifactError, KeyError), match="nested_absmax"):
        reader.decode("m", tensors.__getitem__, reader.scheme_of("m"))
