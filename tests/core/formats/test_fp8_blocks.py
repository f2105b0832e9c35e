"""fp8 weights in square blocks: what is written, what each reader makes of it, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.compatibility import preflight
from compress.core.errors import ArtifactError, InputError, RecipeError, UsageError
from compress.core.formats import _reference, reader_for
from compress.core.formats import compressed_tensors as ct
from compress.core.grid import fit_grid
from compress.core.recipe import parse_recipe
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from tests.quantized_folders import tiny_llama, write_quantized

BLOCKS = Scheme(8, 32, dtype="fp8", activation_bits=8, blocks=True)


def blocks_of(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> QuantTensor:
    return fit_grid(weight, BLOCKS, scale_dtype=dtype).round(weight)


def random_weight(rows: int = 80, width: int = 96) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_holds_for_a_block_and_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """The last block of rows has 16 of 32."""
    weight = random_weight()
    tensor = blocks_of(weight, dtype)
    parts = ct.encode("m", tensor)
    assert parts["m.weight_scale"].shape == (3, 3)
    assert torch.equal(parts["m.weight_scale"][2, 1], (weight[64:, 32:64].abs().max() / 448).to(dtype))
    assert set(parts) == set(ct.stored_names("m", BLOCKS))
    assert sum(part.nbytes for part in parts.values()) == ct.encoded_bytes((80, 96), BLOCKS, dtype)
    assert torch.equal(ct.decode("m", parts.__getitem__, BLOCKS).dequantize(), tensor.dequantize())
    assert float((tensor.dequantize() - weight).norm() / weight.norm()) < 0.04
    save_file(parts, tmp_path / "m.safetensors")
    reader = reader_for({"quantization_config": ct.quantization_config({"m": BLOCKS}, [])})
    rows = np.array([0, 31, 32, 79])
    again = _reference.weights(reader, "m", read_header(tmp_path / "m.safetensors"), BLOCKS, rows)
    assert np.array_equal(again, tensor.dequantize().numpy()[rows])


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_reads_the_same_weights(dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensor = blocks_of(random_weight(), dtype)
    config = QuantizationConfig.model_validate(ct.quantization_config({"m": BLOCKS}, ["lm_head"]))
    stored = {name.removeprefix("m."): value for name, value in ct.encode("m", tensor).items()}
    theirs = BaseCompressor.get_value_from_registry(config.format).decompress(stored, config.config_groups["group_0"])
    assert torch.equal(theirs["weight"], tensor.dequantize(dtype))


@pytest.mark.peer
def test_the_config_is_the_presets() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    usual = Scheme.parse("fp8_block")
    config = QuantizationConfig.model_validate(ct.quantization_config({"m": usual}, []))
    ours, preset = config.config_groups["group_0"], preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    for part in ("weights", "input_activations"):
        told = [getattr(scheme, part).model_dump(exclude={"observer", "observer_kwargs"}) for scheme in (ours, preset)]
        assert told[0] == told[1]
    named = {"quant_method": "compressed-tensors", "config_groups": {"FP8_BLOCK": ["Linear"]}}
    assert ct.scheme_of("m", named) == usual


def test_verify_reads_it_and_finds_a_scale_that_is_missing(tmp_path: Path) -> None:
    write_quantized(tmp_path, BLOCKS)
    report = verify(tmp_path, library=True)
    assert report.ok, [check.detail for check in report.checks if not check.ok]
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    [failed] = [check for check in verify(tmp_path).checks if not check.ok]
    assert failed.detail == f"{name}: is F32 [2, 1], the scheme needs BF16 or F16 or F32 [2, 4]"


def test_what_does_not_fit_is_named() -> None:
    parts = ct.encode("m", blocks_of(random_weight()))
    with pytest.raises(ArtifactError, match=r"m\.weight_scale: is float32 \[3, 2\]"):
        ct.decode("m", (parts | {"m.weight_scale": parts["m.weight_scale"][:, :2]}).__getitem__, BLOCKS)
    with pytest.raises(ArtifactError, match="whole blocks of 32"):
        ct.decode("m", (parts | {"m.weight": parts["m.weight"][:, :90]}).__getitem__, BLOCKS)
    with pytest.raises(ArtifactError, match="blocks of 32 do not divide 90"):
        blocks_of(random_weight(80, 90))
    uneven = fit_grid(random_weight(), Scheme(8, 32, dtype="fp8"), scale_dtype=torch.float32)
    rows = QuantTensor.from_stored(torch.zeros(80, 96, dtype=torch.uint8), uneven.scale, None, BLOCKS)
    with pytest.raises(UsageError, match="one block have different scales"):
        ct.encode("m", rows)


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ({"block_structure": [64, 128]}, {}, r"blocks of \[64, 128\] are not read"),
        ({"block_structure": [32]}, {}, "not two whole numbers"),
        ({}, {"group_size": 64}, "dynamic per token and group of 32"),
        ({}, {"strategy": "token"}, "dynamic per token and group of 32"),
    ],
)
def test_configs_that_are_not_read_are_named(weights: dict, inputs: dict, message: str) -> None:
    config = ct.quantization_config({"m": BLOCKS}, [])
    config["config_groups"]["group_0"]["weights"] |= weights
    config["config_groups"]["group_0"]["input_activations"] |= inputs
    with pytest.raises(InputError, match=message):
        ct.scheme_of("m", config)


def test_engines_want_whole_blocks_in_layers_that_they_fuse() -> None:
    usual = Scheme.parse("fp8_block")
    fused = {f"layers.0.self_attn.{leaf}": usual for leaf in ("q_proj", "k_proj", "v_proj")}
    found = {rows: preflight(fused, dict.fromkeys(fused, (rows, 256)))[0].sentence for rows in (128, 192)}
    assert "on conditions" in found[128]
    assert "blocks of 128 do not divide 192 output channels" in found[192]


def test_a_run_writes_what_was_planned(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    stage = {"quantize": {"method": "fp8", "scheme": "fp8_block", "group_size": 32}}
    recipe = parse_recipe({"model": "model", "stages": [stage]}, base_folder=tmp_path)
    planned = plan(recipe, RunOptions(output=tmp_path / "out"))
    run(recipe, RunOptions(output=tmp_path / "out"))
    files = (tmp_path / "out").glob("*.safetensors")
    assert sum(info.bytes for file in files for info in read_header(file).values()) == planned.bytes_out
    assert verify(tmp_path / "out", source=tmp_path / "model", library=True).ok
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["weights"]["block_structure"] == [32, 32]


def test_layers_that_blocks_do_not_divide(tmp_path: Path) -> None:
    tiny_llama(ffn=96).save_pretrained(tmp_path / "model")
    for uneven, wanted in (("channel", Scheme.parse("fp8")), ("smaller", Scheme.parse("fp8_block", group_size=48))):
        stage = {"quantize": {"method": "fp8", "scheme": "fp8_block", "group_size": 64, "uneven": uneven}}
        recipe = parse_recipe({"model": "model", "stages": [stage]}, base_folder=tmp_path)
        layers = plan(recipe, RunOptions(output=tmp_path / "out")).stages[0].layers
        assert {layer.scheme for layer in layers if layer.shape[1] == 96} == {wanted}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "fp8", "scheme": "fp8_block", "group_size": -1}, "group_size: 128"),
        ({"method": "gptq", "scheme": "fp8_block"}, "whole numbers"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    data = {"model": "m", "calibration": {"dataset": "demo"}, "stages": [{"quantize": settings}]}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(data)
