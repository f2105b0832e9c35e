"""Static inputs in compressed-tensors: one scale a layer, written, read by everybody, and verified."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.formats import compressed_tensors as ct
from compress.core.grid import input_scale
from compress.core.scheme import Scheme
from compress.core.verify import verify
from tests.quantized_folders import quantize_weight, write_quantized

SCHEMES = [Scheme(8, dtype=dtype, activation_bits=8, static_inputs=True) for dtype in ("int", "fp8")]
each = pytest.mark.parametrize("scheme", SCHEMES, ids=[scheme.name for scheme in SCHEMES])
NAME = "model.layers.1.mlp.down_proj.input_scale"


@each
def test_the_scale_is_stored_and_comes_back(scheme: Scheme) -> None:
    tensor = quantize_weight(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)), scheme, torch.bfloat16)
    parts = ct.encode("m", tensor)
    assert set(parts) == set(ct.stored_names("m", scheme)) == {"m.weight", "m.weight_scale", "m.input_scale"}
    assert sum(part.nbytes for part in parts.values()) == ct.encoded_bytes((20, 32), scheme, torch.bfloat16)
    again = ct.decode("m", parts.__getitem__, scheme)
    assert again.input_scale is not None and tensor.input_scale is not None
    assert torch.equal(again.input_scale, tensor.input_scale) and torch.equal(again.dequantize(), tensor.dequantize())
    assert again.rows(3, 9).input_scale is again.input_scale
    config = ct.quantization_config({"m": scheme}, [])
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    assert ct.scheme_of("m", config) == scheme and Scheme.parse(scheme.name) == scheme


@pytest.mark.peer
@each
def test_the_library_takes_the_largest_input_as_we_do(scheme: Scheme) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    config = QuantizationConfig.model_validate(ct.quantization_config({"m": scheme}, []))
    inputs = config.config_groups["group_0"].input_activations
    assert inputs is not None
    theirs, _ = calculate_qparams(torch.tensor([-3.7]), torch.tensor([2.1]), inputs)
    assert torch.equal(input_scale(torch.tensor(3.7), scheme, torch.float32), theirs)
    assert float(input_scale(torch.tensor(0.0), scheme, torch.float32)) == 1  # a layer that saw nothing but zeros


@each
def test_verify_checks_the_scale(tmp_path: Path, scheme: Scheme) -> None:
    write_quantized(tmp_path, scheme)
    report = verify(tmp_path, library=True)
    assert report.ok, [check.detail for check in report.checks if not check.ok]
    tensors = load_file(tmp_path / "model.safetensors")

    def failures(**changed: torch.Tensor | None) -> list[str]:
        kept = {name: value for name, value in (tensors | changed).items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        return [check.detail for check in verify(tmp_path).checks if not check.ok]

    assert failures(**{NAME: None}) == [f"{NAME}: is missing"]
    assert failures(**{NAME: torch.zeros(1)}) == [f"{NAME}: holds a scale that is zero"]
    [negative] = failures(**{NAME: torch.full((1,), -0.1)})
    assert "one positive float" in negative
    [two] = failures(**{NAME: torch.ones(2)})
    assert two == f"{NAME}: is F32 [2], the scheme needs BF16 or F16 or F32 [1] or []"


def test_a_scale_does_not_belong_to_dynamic_inputs(tmp_path: Path) -> None:
    write_quantized(tmp_path, replace(SCHEMES[0], static_inputs=False))
    tensors = load_file(tmp_path / "model.safetensors") | {NAME: torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"{NAME}: does not belong to a w8a8 layer" in [check.detail for check in verify(tmp_path).checks]


def test_what_makes_no_sense_is_refused() -> None:
    tensor = quantize_weight(torch.ones(4, 32), SCHEMES[0])
    with pytest.raises(UsageError, match="m: its static inputs have no scale yet"):
        ct.encode("m", replace(tensor, input_scale=None))
    with pytest.raises(ArtifactError, match="only those, have one scale"):
        replace(tensor, input_scale=torch.ones(2))
    for scheme in ({"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}):
        with pytest.raises(UsageError, match="static inputs go with 8-bit weights"):
            Scheme(**scheme, activation_bits=8, static_inputs=True)
    config = ct.quantization_config({"m": Scheme(8, 32, dtype="fp8", activation_bits=8, blocks=True)}, [])
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    with pytest.raises(InputError, match="dynamic per token and group of 32"):
        ct.scheme_of("m", config)
