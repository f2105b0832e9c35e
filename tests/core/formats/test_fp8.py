"""fp8 weights of compressed-tensors (float-quantized): both decoders, the library, and a whole model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError
from compress.core.formats import _reference, reader_for
from compress.core.formats import compressed_tensors as ct
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme
from compress.core.verify import verify
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
        ({"strategy": "block"}, "'block'"),
        ({"strategy": "group", "group_size": 32}, "'group'"),
        ({"symmetric": False}, "zero points"),
    ],
)
def test_configs_that_are_not_read_are_named(weights: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ct.scheme_of("a", config(**weights))


def test_inputs_may_stay_as_they_are_but_not_be_static() -> None:
    settings = config()
    group = settings["config_groups"]["group_0"]
    group["input_activations"] = None
    assert ct.scheme_of("a", settings) == Scheme(8, dtype="fp8")
    group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    with pytest.raises(InputError, match="dynamic per token"):
        ct.scheme_of("a", settings)


def test_the_preset() -> None:
    settings = config() | {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    assert ct.scheme_of("a", settings) == FP8
