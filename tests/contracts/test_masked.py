"""Zeros of a pruned model stay zeros, whatever quantizes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compress.core.checkpoint import Checkpoint
from compress.core.methods import find_pass
from compress.core.model_files import MASKED_KEY
from prune._masks import keep
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run
from tests.contracts.test_passes import OWN_SCHEMES, QUANTIZERS, settings_of


@pytest.fixture
def masked(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """The tiny Llama with half of its layers' weights zero."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for file in tiny_model("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {MASKED_KEY: True}))
    tensors = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    for index in range(checkpoint.num_blocks):
        for site in checkpoint.sites(index):
            weight = tensors[f"{site}.weight"]
            weight.mul_(keep(weight.abs().float(), 0.5, None, "layer"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_zeros_stay_zeros(masked: Path, method: str, symmetric: bool) -> None:
    asked = {} if method in OWN_SCHEMES else {"scheme": "w3a16", "symmetric": symmetric}
    settings = settings_of(method, group_size=16, **asked)
    checkpoint = Checkpoint.open(masked)
    assert checkpoint.kind == "masked" and settings.refusal("masked") is None
    done = run(masked, settings, Shelf()).quantized
    assert done
    for name, tensor in done.items():
        weight = checkpoint.weight(name)
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert bool((tensor.dequantize()[weight == 0] == 0).all()), name


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16"])
def test_zeros_stay_zeros_among_floats(masked: Path, scheme: str) -> None:
    checkpoint = Checkpoint.open(masked)
    ignored = [] if scheme == "nvfp4a16" else ["*.o_proj", "*.down_proj"]
    for name, tensor in run(masked, settings_of("gptq", scheme=scheme, ignore=ignored), Shelf()).quantized.items():
        assert bool((tensor.dequantize()[checkpoint.weight(name) == 0] == 0).all()), name


def test_transforms_that_mix_channels_are_refused() -> None:
    rotated = find_pass("quantize", "gptq").model_validate_json('{"prepare": [{"rotate": {}}]}')
    assert rotated.refusal("masked") == "takes dense weights behind prepare: rotate, which leaves no zero a zero"
    assert rotated.refusal("dense") is None
    scaled = find_pass("quantize", "gptq").model_validate_json('{"prepare": [{"awq_scale": {}}]}')
    assert scaled.refusal("masked") is None


def test_what_is_left_makes_up_for_its_own_rounding(masked: Path) -> None:
    """Much damping leaves GPTQ next to nothing but rounding to nearest."""
    errors = []
    for damping in (10.0, 0.01):
        shelf = run(masked, settings_of("gptq", scheme="w3a16", group_size=16, damping=damping), Shelf())
        errors.append(sum(record.output_error or 0 for record in shelf.records))
    assert 0 < errors[1] < 0.9 * errors[0]


def test_a_pruned_model_may_be_pruned_further(masked: Path) -> None:
    checkpoint = Checkpoint.open(masked)
    for method in ("magnitude", "wanda", "sparsegpt", "alps"):
        settings = find_pass("prune", method).model_validate_json('{"sparsity": 0.7}')
        for name, weight in run(masked, settings, Shelf()).dense.items():
            assert bool((weight[checkpoint.tensor(name) == 0] == 0).all()), (method, name)
            assert float((weight == 0).float().mean()) == pytest.approx(0.7, abs=0.02), (method, name)
