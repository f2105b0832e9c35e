"""The walk: every family, block by block, against transformers' own forward."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.statistics import Hessian
from compress.core.walk import stream_logits, walk
from tests.conftest import TinyModel
from tests.tiny import FAMILIES


def tokens_of(checkpoint: Checkpoint, samples: int = 5, length: int = 24, lengths: list[int] | None = None) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, checkpoint.config["vocab_size"], (samples, length), generator=generator)
    return Tokens(ids, None if lengths is None else torch.tensor(lengths), sha256="", source="random")


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_transformers(tiny_model: TinyModel, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    checkpoint = Checkpoint.open(folder)
    tokens = tokens_of(checkpoint)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens.ids).logits
    streamed = torch.cat(list(stream_logits(checkpoint, tokens, micro_batch=2)))
    torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
