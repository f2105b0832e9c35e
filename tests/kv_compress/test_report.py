"""What a report predicts is what the runtime allocates."""

from __future__ import annotations

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.kv_report import PER_CHANNEL, kv_report
from kv_compress.policy import CODECS, FULL, KVPolicy
from runtime.cache import KVCache
from runtime.frames import cache_for
from runtime.models.config import ModelConfig
from runtime.models.reading import read
from tests.conftest import TinyModel

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral")
BOTH_FORMS = [(family, odd) for family in FAMILIES for odd in (False, True) if (family, odd) != ("gemma3_text", True)]


@pytest.mark.parametrize(("family", "odd"), BOTH_FORMS)
def test_bytes_are_those_that_the_runtime_allocates(tiny_model: TinyModel, family: str, odd: bool) -> None:
    checkpoint = Checkpoint.open(tiny_model(family, odd))
    config = read(checkpoint.config)
    for dtype in (torch.float32, torch.bfloat16):
        found = kv_report(checkpoint, memory_bytes=10**6, context=300, dtype=dtype)
        *ways, paged = found.ways
        assert paged.name == PER_CHANNEL
        channels = KVPolicy.uniform("int4", len(config.layers), keys="channel", sinks=4, recent=64)
        frames = cache_for(config, 10**6 // paged.page_bytes, 16, dtype, policy=channels)
        assert frames.bytes == frames.pages * paged.page_bytes <= 10**6 < frames.bytes + paged.page_bytes
        assert paged.longest == frames.points.longest(frames.pages)
        most, points = 0, frames.points
        for stored in range(1, 301):  # what one sequence holds, before anything is coded there
            coded = sum(stored > at for at in map(points.position, range(1, 20))) * points.together
            most = max(most, coded + -(-(stored - coded * points.page_tokens) // 16))
        assert paged.sequences == frames.pages // most
        assert paged.token_bytes == -(-paged.page_bytes // points.page_tokens) < found.full_bytes / 2
        for way in ways:
            policy = None if way.name == FULL else way.name
            cache = KVCache(config, 7, 16, dtype, policy=uniform(policy, config))
            assert cache.bytes == 7 * way.page_bytes == 7 * 16 * way.token_bytes
            assert way.tokens * way.token_bytes <= 10**6 < (way.tokens + 16) * way.token_bytes
        assert {way.name for way in ways} == {FULL, *CODECS}


def uniform(name: str | None, config: ModelConfig) -> KVPolicy | None:
    return None if name is None else KVPolicy.uniform(name, len(config.layers))


def test_what_fits_follows_by_hand(tiny_model: TinyModel) -> None:
    """3 layers of 2 heads of 16 channels: 768 bytes of a token in fp32, 216 in int8 with two bytes a head and side."""
    found = kv_report(Checkpoint.open(tiny_model("llama")), memory_bytes=768 * 16 * 20, context=40, dtype=torch.float32)
    ways = {(way.name, way.share): way for way in found.ways}
    assert (found.full_bytes, found.ungrouped_bytes) == (768, 1536)  # four query heads share two
    assert ways[FULL, 1.0].sequences == 20 // 3
    assert ways[FULL, 1.0].longest == 320
    assert ways[FULL, 0.25].sequences == 20  # 10 tokens are one page
    assert ways["int8", 1.0].token_bytes == 3 * 2 * 2 * 18
    assert ways["int8", 0.5].sequences == (768 * 20 // 216) // 2
