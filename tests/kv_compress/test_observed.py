"""Attention that is looked at is eager attention: the same logits in every family, and causal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from kv_compress._observed import Seen, observed
from tests import tiny


@pytest.mark.parametrize(("family", "odd"), [("llama", False), ("qwen2", True), ("gemma2", False), ("phi3", True)])
def test_logits_are_those_of_eager(tmp_path: Path, family: str, odd: bool) -> None:
    model = Checkpoint.open(tiny.build(tmp_path, family, odd=odd)).build_model(torch.float32)
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
    seen: list[Seen] = []
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        with observed(model, lambda each: seen.append(each)):
            found = model(input_ids=ids).logits
            cut = model(input_ids=ids[:, :9]).logits
    assert (found - expected).abs().max() < 2e-5
    assert (cut - found[:, :9]).abs().max() < 2e-5  # what comes later is not seen
    assert [each.layer for each in seen] == [*range(tiny.LAYERS)] * 2
    assert model.config._attn_implementation == "eager"
