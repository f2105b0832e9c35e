"""fp8 weights of compressed-tensors (float-quantized): both decoders, the library, and a whole model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError, RecipeError
from compress.core.formats import _reference, reader_for
from compress.core.formats import compressed_tensors as ct
from compress.core.grid import fit_grid
from compress.core.recipe import parse_recipe
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from runtime.llm import LLM
from tests.quantized_folders import SITES, tiny_llama

FP8 = Scheme(8, dtype="fp8", activation_bits=8)


def config(**weights: object) -> dict[str, object]:
    plain = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": plain | weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def stored(weight: torch.Tensor, *, whole: bool = False) -> dict[str, torch.Tensor]:
    largest = weight.abs().amax().reshape(1) if whole else weight.abs().amax(dim=1, keepdim=True)
    scale = largest / 448
    return {"m.weight": (weight / scale).to(torch.float8_e4m3fn), "m.weight_scale": scale}


@pytest.mark.parametrize("whole", [False, True])
def test_both_decoders_read_the_weight(tmp_path: Path, whole: bool) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    tensors = stored(weight, whole=whole)
    reader = reader_for({"quantization_config": config(strategy="tensor" if whole else "channel")})
    assert reader.modules(tensors) == {"m": FP8}
    found = reader.decode("m", tensors.__getitem__, FP8).dequantize()
    assert torch.equal(found, tensors["m.weight"].float() * tensors["m.weight_scale"])
    assert float((found - weight).norm() / weight.norm()) < 0.04
    save_file(tensors, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors")
    assert reader.shape_of("m", FP8, infos) == (24, 40)
    assert np.array_equal(_reference.weights(reader, "m", infos, FP8, np.arange(24)), found.numpy())


def test_all_bit_patterns_are_read_alike(tmp_path: Path) -> None:
    patterns = torch.arange(256, dtype=torch.uint8)
    patterns = patterns[(patterns & 0x7F) != 0x7F].view(1, -1)  # without NaN
    tensors = {"m.weight": patterns.view(torch.float8_e4m3fn), "m.weight_scale": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "m.safetensors")
    reader = reader_for({"quantization_config": config()})
    ours = reader.dequantize("m", tensors.__getitem__, FP8, torch.float32)
    again = _reference.weights(reader, "m", read_header(tmp_path / "m.safetensors"), FP8, np.arange(1))
    assert torch.equal(ours, tensors["m.weight"].float())
    assert np.array_equal(ours.numpy(), again)


def write_model(path: Path) -> dict[str, torch.Tensor]:
    """A tiny Llama in fp8; what it means, by the names of its source."""
    model = tiny_llama()
    model.save_pretrained(path)
    state, tensors = {name: value.clone() for name, value in model.state_dict().items()}, {}
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in SITES:
            parts = stored(value)
            tensors |= {f"{module}{key.removeprefix('m')}": part for key, part in parts.items()}
            state[name] = parts["m.weight"].float() * parts["m.weight_scale"]
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text()) | {"quantization_config": config()}
    (path / "config.json").write_text(json.dumps(settings))
    return state


def test_a_model_passes_verification_and_opens(tmp_path: Path) -> None:
    wanted = write_model(tmp_path)
    report = verify(tmp_path, library=True)
    assert report.ok, [check for check in report.checks if not check.ok]
    library = next(check for check in report.checks if check.name == "library")
    assert "agrees" in library.detail
    model = Checkpoint.open(tmp_path).build_model(torch.float32)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_verification_finds_nan(tmp_path: Path) -> None:
    write_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    failed = [check for check in verify(tmp_path).checks if not check.ok]
    assert [check.detail for check in failed] == [f"{name}: holds NaN"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda value: value.float()),
        ("weight", lambda value: value[0]),
        ("weight_scale", lambda value: value[1:]),
        ("weight_scale", lambda value: value.to(torch.int32)),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, change) -> None:
    tensors = stored(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    tensors[f"m.{name}"] = change(tensors[f"m.{name}"])
    with pytest.raises(ArtifactError, match=rf"m\.{name}: is"):
        ct.decode("m", tensors.__getitem__, FP8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"type": "int"}, "int8 weights are not read in this format"),
        ({"num_bits": 4}, "float4"),
        ({"strategy": "block"}, "block_structure None"),
        ({"strategy": "group", "group_size": 32}, "'group'"),
        ({"symmetric": False}, "zero points"),
    ],
)
def test_configs_that_are_not_read_are_named(weights: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ct.scheme_of("a", config(**weights))


def test_inputs_may_stay_as_they_are_or_be_static() -> None:
    settings = config()
    group = settings["config_groups"]["group_0"]
    group["input_activations"] = None
    assert ct.scheme_of("a", settings) == Scheme(8, dtype="fp8")
    group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    assert ct.scheme_of("a", settings) == Scheme(8, dtype="fp8", activation_bits=8, static_inputs=True)
    group["input_activations"]["strategy"] = "channel"
    with pytest.raises(InputError, match="static per tensor or dynamic per token"):
        ct.scheme_of("a", settings)


def test_the_preset() -> None:
    settings = config() | {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    assert ct.scheme_of("a", settings) == FP8


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    for dtype in (torch.float32, torch.bfloat16):
        tensor = fit_grid(weight, FP8, scale_dtype=dtype).round(weight)
        parts = ct.encode("m", tensor)
        assert set(parts) == set(ct.stored_names("m", FP8))
        assert sum(part.nbytes for part in parts.values()) == ct.encoded_bytes((24, 40), FP8, dtype)
        assert parts["m.weight"].dtype is torch.float8_e4m3fn and tuple(parts["m.weight_scale"].shape) == (24, 1)
        assert torch.equal(ct.decode("m", parts.__getitem__, FP8).dequantize(), tensor.dequantize())
        worst = (tensor.dequantize() - weight).abs() / weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-9)
        assert float(worst.max()) < 1.05 / 28  # half a step of the largest numbers, a little more where scales are bf16
        assert not tensor.dequantize()[3].any()


def test_codes_are_the_nearest_ones() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    grid = fit_grid(weight, FP8, scale_dtype=torch.float32)
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()]
    exact = weight / grid.scale
    nearest = (exact[..., None] - levels).abs().amin(-1)
    found = (grid.round(weight).dequantize() / grid.scale - exact).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", ["fp8", "fp8a16"])
def test_a_run_writes_what_readers_take(tmp_path: Path, scheme: str) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    stage = {"quantize": {"method": "fp8", "scheme": scheme}}
    recipe = parse_recipe({"model": "model", "stages": [stage]}, base_folder=tmp_path)
    planned = plan(recipe, RunOptions(output=tmp_path / "out"))
    run(recipe, RunOptions(output=tmp_path / "out"))
    files = (tmp_path / "out").glob("*.safetensors")
    assert sum(info.bytes for file in files for info in read_header(file).values()) == planned.bytes_out
    assert verify(tmp_path / "out", source=tmp_path / "model", library=True).ok
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    [group] = settings["config_groups"].values()
    assert settings["format"] == "float-quantized" and group["weights"]["type"] == "float"
    assert ("input_activations" in group) == (scheme == "fp8")
    with LLM(tmp_path / "out") as llm:
        assert llm.generate([[5, 6, 7]], max_tokens=3, ignore_eos=True)[0].token_ids


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "gptq", "scheme": "fp8"}, "whole numbers; methods for fp8 are rtn and fp8"),
        ({"method": "hqq", "scheme": "fp8a16"}, "whole numbers"),
        ({"method": "fp8", "group_size": 64}, "one scale per channel"),
        ({"method": "fp8", "symmetric": False}, "no zero points"),
        ({"method": "rtn", "scheme": "fp4"}, "unknown scheme 'fp4'"),
        ({"method": "fp8", "prepare": [{"smoothquant": {}}]}, "outliers cost floats"),
        ({"method": "awq", "overrides": [{"layers": "x", "scheme": "fp8"}]}, "whole numbers"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    data = {"model": "m", "calibration": {"dataset": "demo"}, "stages": [{"quantize": settings}]}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(data)
