"""inspect: facts about folders of ours and of other tools."""

import json
from pathlib import Path

import pytest
import torch

from compress.core.errors import InputError, UsageError
from compress.core.inspect import inspect
from compress.core.model_files import MASKED_KEY
from compress.core.scheme import Scheme
from compress.core.zeros import Zeros
from tests.quantized_folders import tiny_llama, write_quantized

ORACLES = Path(__file__).parents[1] / "oracles"


def test_an_artifact(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, Scheme(4, 32), tied=True, shards=True, dtype=torch.bfloat16)
    found = inspect(tmp_path)
    assert found.family == "llama"
    assert found.tied
    assert found.files == 3
    assert found.parameters == sum(value.numel() for value in folder.source.values())
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) - header_bytes(tmp_path)
    assert found.schemes == {"BF16": 6, "w4a16, groups of 32": 14}
    layer = next(layer for layer in found.layers if layer.name == "model.layers.1.mlp.down_proj")
    assert (layer.shape, layer.group_size, layer.symmetric) == ((64, 128), 32, True)
    assert layer.bits_per_weight == pytest.approx(4 + 16 / 32 + 8 * 16 / (64 * 128))  # codes, scales, weight_shape
    assert {verdict.engine: verdict.ok for verdict in found.engines}["transformers"] == "yes"
    json.dumps(found.as_dict())


def header_bytes(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_a_dense_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.method is None
    assert found.schemes == {"F32": 21}
    assert found.bits_per_weight == 32
    assert found.engines == ()


def test_zeros_of_a_masked_model(tmp_path: Path) -> None:
    model = tiny_llama()
    sites = [module for name, module in model.named_modules() if name.endswith("_proj")]
    for module in sites:
        module.weight.data.view(-1, 4)[:, :2] = 0
    sites[0].weight.data[0, 0] = 1.0
    sites[0].weight.data[0, 4:8] = 0
    model.save_pretrained(tmp_path)
    assert inspect(tmp_path).zeros is None
    weights = sum(module.weight.numel() for module in sites)
    asked = inspect(tmp_path, zeros=True)
    assert asked.zeros == Zeros((weights / 2 + 1) / weights, 14, 13)
    config = json.loads((tmp_path / "config.json").read_text()) | {MASKED_KEY: True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path).zeros == asked.zeros
    json.dumps(asked.as_dict())


def test_zeros_of_quantized_weights_are_not_counted(tmp_path: Path) -> None:
    write_quantized(tmp_path, Scheme(4, 32))
    found = inspect(tmp_path, zeros=True)
    assert found.zeros is None
    assert any("zeros are counted in" in notice for notice in found.notices)


@pytest.mark.parametrize("name", ["gptqmodel-w4", "llmcompressor-w8a8", "llmcompressor-w4a16-asymmetric"])
def test_artifacts_of_other_tools(name: str) -> None:
    found = inspect(ORACLES / name)
    assert found.parameters == 2 * 64 * (64 + 32 + 32 + 64 + 3 * 64) + 96 * 64 + 5 * 64
    assert sum(layer.group_size is not None for layer in found.layers) == 14
    assert found.engines


def test_layers_come_in_natural_order(tmp_path: Path) -> None:
    write_quantized(tmp_path, Scheme(4, 32), layers=11)
    numbers = [int(layer.name.split(".")[2]) for layer in inspect(tmp_path).layers if ".layers." in layer.name]
    assert numbers == sorted(numbers)


def test_formats_that_are_not_read_are_a_notice(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "'hqq'" in inspect(tmp_path).notices[0]


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a model folder: config.json is missing"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no safetensors weights"):
        inspect(tmp_path)
