"""A whole artifact, made by a run, is verified against its source and opened by transformers: equal logits."""

from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.recipe import load_recipe
from compress.core.verify import verify
from compress.inputs import RunOptions
from compress.pipeline import run

RECIPE = """model: {model}
stages:
  - quantize: {{method: rtn, scheme: w4a16, group_size: 32}}
"""
# Measured: exactly 0 in fp32 on the same machine; the bound leaves room for another order of summation.
LOGITS_BOUND = 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_transformers_computes_what_we_compute(tmp_path: Path, tiny_model, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = tiny_model(family)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=source))
    artifact = run(load_recipe(recipe), RunOptions(output=tmp_path / "artifact")).artifact
    report = verify(artifact, source=source, library=True)
    assert report.ok, [check.detail for check in report.checks if not check.ok]
    assert {"coverage", "lineage", "kept", "closeness"} <= {check.name for check in report.checks}

    ids = torch.arange(24)[None] + 3
    ours = Checkpoint.open(artifact).build_model(torch.float32)
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, quantization_config=config).eval()
    dense = Checkpoint.open(source).build_model(torch.float32)
    with torch.no_grad():
        logits, loaded, before = (model(ids).logits for model in (ours, theirs, dense))
    assert (logits - loaded).abs().max() < LOGITS_BOUND
    assert (logits - before).abs().max() > 100 * LOGITS_BOUND  # it was quantized, after all
