"""Artifacts that llm-compressor and GPTQModel wrote (tests/oracles), read, opened and verified by us."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.core.checkpoint import Checkpoint
from compress.core.formats import reader_for
from compress.core.safetensors_io import load_tensor, read_header
from compress.core.scheme import Scheme
from compress.core.verify import verify

ORACLES = Path(__file__).parents[2] / "oracles"
ARTIFACTS = {
    "llmcompressor-w4a16": Scheme(4, 32),
    "llmcompressor-w4a16-asymmetric": Scheme(4, 32, symmetric=False),
    "llmcompressor-w8a8": Scheme(8, -1, activation_bits=8),
    "gptqmodel-w4": Scheme(4, 32),
}
# GPTQModel rounds its fp16 scales to the model's bf16 before it multiplies; the others multiply what is stored.
TOLERANCE = {"gptqmodel-w4": 2**-7}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_weights_equal_those_of_the_tool(name: str) -> None:
    folder = ORACLES / name
    reader = reader_for(json.loads((folder / "config.json").read_text()))
    infos = read_header(folder / "model.safetensors")
    schemes = reader.modules(infos)
    assert set(schemes.values()) == {ARTIFACTS[name]}
    assert len(schemes) == 14
    expected = load_file(ORACLES / "expected" / f"{name}.safetensors")
    assert expected
    for layer, wanted in expected.items():
        found = reader.dequantize(layer, lambda name: load_tensor(infos[name]), schemes[layer], wanted.dtype)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE.get(name, 0), atol=0)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_they_pass_verification(name: str) -> None:
    report = verify(ORACLES / name, library=True)
    assert report.ok, report.checks
    assert {check.name for check in report.checks} >= {"headers", "quantization", "layers", "shapes", "contents"}
    assert any("no compress.json" in notice for notice in report.notices)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_they_can_be_sources(name: str) -> None:
    checkpoint = Checkpoint.open(ORACLES / name)
    layer, wanted = next(iter(load_file(ORACLES / "expected" / f"{name}.safetensors").items()))
    torch.testing.assert_close(checkpoint.weight(layer, wanted.dtype), wanted, rtol=TOLERANCE.get(name, 0), atol=0)
    with torch.no_grad():
        logits = checkpoint.build_model(torch.float32)(torch.arange(3, 35)[None]).logits
    assert torch.isfinite(logits).all()
