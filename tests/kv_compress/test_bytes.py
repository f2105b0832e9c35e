"""Bytes that a plan, a report and a check tell are those that the runtime allocates, in whichever dtype it computes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.numerics import runtime_dtype
from compress.kv_report import PER_CHANNEL, kv_report
from kv_compress.stage import KVCache
from runtime.llm import LLM
from tests.conftest import TinyModel
from tests.kv_compress.conftest import RuntimeHolds

POOL = 1 << 20
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(params=DTYPES)
def held(request: pytest.FixtureRequest, runtime_holds: RuntimeHolds) -> str:
    """The dtype that the runtime takes by itself."""
    runtime_holds(request.param)
    return request.param


def numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found, text
    return [int(number.replace(",", "")) for number in found.groups()]


EVICTING = {"sinks": 2, "recent": 8}
SETTINGS: list[dict[str, Any]] = [
    {"precision": "full"},
    {"precision": "int8"},
    {"precision": "int4"},
    {"precision": "fp8"},
    {"precision": "full", "eviction": {"method": "streaming", "budget": {"bytes": "10KiB"}} | EVICTING},
    {"precision": "int4", "eviction": {"method": "h2o", "budget": {"bytes": "10KiB"}} | EVICTING},
    {"precision": "int4", "eviction": {"method": "adakv", "budget": {"bytes": "10KiB"}} | EVICTING},
    {"precision": "int4", "keys": "channel"},
]


@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_what_a_plan_says_is_allocated(tiny_model: TinyModel, held: str, asked: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))  # in float32 itself
    settings = KVCache.model_validate(asked)
    [size, *more] = settings.plan(checkpoint, None).notices
    of_token, before = numbers(r"take ([\d,]+) bytes instead of ([\d,]+) in " + held, size)
    assert before == 3 * 2 * 2 * 16 * getattr(torch, held).itemsize
    llm = LLM(checkpoint, kv_cache=settings.policy(checkpoint), kv_bytes=POOL, max_length=256)
    pool, points = llm.engine.scheduler.pool, llm.engine.scheduler.points
    assert llm.ledger.kv_pool_bytes == pool.pages * pool.page.bytes <= POOL
    if settings.keys == "channel":
        [tokens] = numbers(r", (\d+) in a page", size)
        assert tokens == points.page_tokens and of_token == -(-pool.page.bytes // tokens)
    else:
        assert llm.ledger.kv_pool_bytes == of_token * llm.kv_tokens
    if settings.eviction is not None:
        assert numbers(r"([\d,]+) tokens stay", more[0]) == [points.tokens] == [10240 // of_token]


def test_a_report_says_what_is_allocated(tiny_model: TinyModel, held: str) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    report = kv_report(checkpoint, memory_bytes=POOL, context=256, dtype=runtime_dtype())
    assert report.full_dtype == held
    ways = {way.name: way for way in report.ways if way.share == 1}
    for name, way in ways.items():
        settings = KVCache(precision="int4", keys="channel") if name == PER_CHANNEL else KVCache(precision=name)
        llm = LLM(checkpoint, kv_cache=settings.policy(checkpoint), kv_bytes=POOL, max_length=256)
        assert llm.engine.scheduler.pool.page.bytes == way.page_bytes
        assert (llm.ledger.kv_pool_bytes // way.page_bytes, llm.kv_tokens) == (POOL // way.page_bytes, way.longest)


def test_numerics_decide_and_a_wish_counts(held: str) -> None:
    assert runtime_dtype() is runtime_dtype("fast", "cpu") is getattr(torch, held)
    assert runtime_dtype("exact") is torch.float32
    assert runtime_dtype("fast", "cuda") is torch.bfloat16
    assert runtime_dtype("fast", "cpu", torch.float16) is torch.float16
    with pytest.raises(UsageError, match="exact numerics compute in float32, not in bfloat16"):
        runtime_dtype("exact", "cpu", torch.bfloat16)
