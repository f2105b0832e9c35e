"""Evictions on real layers: what is left is attended to as if the rest were masked, and pages come back as foretold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from compress.core.errors import UsageError
from kv_compress.eviction import UNEQUAL, Budget, Method
from runtime.llm import LLM
from runtime.scheduler import RequestTooLong
from tests.conftest import TinyModel
from tests.runtime._evictions import (
    BLOCK,
    PROMPTS,
    completions_of,
    masked_logits,
    masks,
    page_bytes,
    params,
    policy,
)
from tests.runtime._folders import edited
from tests.runtime._naive import prompts_of
from tests.runtime._watched import Watched

METHODS = sorted(set(get_args(Method)) - UNEQUAL)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_gone_is_as_if_masked(method: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In exact numerics, and in fast ones through all of their routes."""
    folder = tiny_model("llama")
    for numerics in ("exact", "fast"):
        options = {"numerics": numerics, "dtype": torch.float32, "block_size": BLOCK, "token_budget": 24}
        llm = LLM(folder, **options, eviction=policy(method))
        watched = Watched(monkeypatch, llm)
        completions = llm.generate(PROMPTS, max_tokens=26, ignore_eos=True)
        monkeypatch.undo()
        layers, groups = len(llm.config.layers), llm.config.layers[0].kv_heads
        for sequence, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
            ids = [*prompt, *completion.token_ids]
            kept = watched.kept[sequence]
            if sequence == 3 and method != "h2o":  # begins on the pages that the first one's eviction left
                assert 22 not in kept
                kept[22] = watched.kept[0][22]
            # Every 11 of the prompt, its end, and every 11 behind it, once there are more than 14.
            grid = [*range(11, len(prompt), 11), *range(len(prompt), len(ids) - 1, 11)]
            assert sorted(kept) == [p for p in grid if p > 14]
            assert all(tuple(each.shape) == (groups, 14) for chosen in kept.values() for each in chosen)
            expected = masked_logits(folder, llm.config, ids, masks(kept, layers, groups, len(ids)))
            plain = masked_logits(folder, llm.config, ids, masks({}, layers, groups, len(ids)))
            found = watched.logits[sequence]
            assert sorted(found) == list(range(len(prompt) - 1, len(ids) - 1))
            worst = max(float((logits - expected[at]).abs().max()) for at, logits in found.items())
            assert worst < 1e-4
            assert max(float((logits - plain[at]).abs().max()) for at, logits in found.items()) > 100 * worst


@pytest.mark.parametrize("method", ["snapkv", "tova", "expected_attention", "random"])
def test_tokens_depend_on_nothing_but_prompt_and_policy(method: str, tiny_model: TinyModel) -> None:
    folder, eviction = tiny_model("llama"), policy(method)
    pages = page_bytes(LLM(folder, numerics="exact").config)
    alone, _ = completions_of(folder, eviction, max_sequences=1, prefix_cache=False)
    batched, cached = completions_of(folder, eviction, token_budget=13)
    tight, pressed = completions_of(folder, eviction, token_budget=64, kv_bytes=9 * pages)
    assert alone == batched == tight
    assert cached.hits > 8 and pressed.preemptions > 2


def pages_after(tokens: int) -> Iterator[int]:
    """Pages held after each step of a sequence, by hand: 14 stay at each point, then one more slot a token."""
    slots = 14  # the prompt is done in one step a stretch, and its end is a point
    for generated in range(1, tokens):
        slots += 1
        if generated % 11 == 0:
            slots = 14
        yield -(-slots // BLOCK)


@pytest.mark.parametrize("method", METHODS)
def test_pages_come_back_as_foretold(method: str, tiny_model: TinyModel) -> None:
    llm = LLM(tiny_model("llama"), block_size=BLOCK, prefix_cache=False, eviction=policy(method))
    engine, pages = llm.engine, llm.engine.scheduler.pool.pages
    engine.add(PROMPTS[0], params(26))
    held = []
    while engine.has_work:
        engine.step()
        held.append(pages - llm.stats().pages.free)
    # 45 tokens: to 22, where 14 stay (11 are no more than that); to 33, to 44, to the end. Until the last, the pages
    # for the most slots to come stay reserved: 25 are 7 pages.
    assert held[:4] == [7, 7, 4, 4]
    assert held[4:] == [*pages_after(26)][:-1] + [0]


def test_pages_do_not_grow_with_the_prompt(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A pool of budget and chunk serves prompts of any length; without points in the prompt they are refused."""
    folder = edited(tiny_model("llama"), tmp_path / "long", {"max_position_embeddings": 8192})
    eviction = policy("keydiff", budget=Budget(tokens=32), every=64)
    peaks = []
    for length in (200, 3000):
        llm = LLM(folder, block_size=BLOCK, eviction=eviction, kv_bytes=24 * page_bytes(LLM(folder).config))
        llm.engine.add(prompts_of((length,), 320)[0], params(4))
        owned = []
        while llm.engine.has_work:
            llm.engine.step()
            owned.append(llm.stats().pages.owned)
        peaks.append(max(owned))
    assert peaks == [24, 24]
    refusing = LLM(
        folder, block_size=BLOCK, eviction=policy(when=("prefill_end",)), kv_bytes=24 * page_bytes(llm.config)
    )
    with pytest.raises(RequestTooLong, match="slots at once"):
        refusing.generate([[5] * 200], max_tokens=200)


def test_windows_are_never_broken(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="sliding window of 8"):
        LLM(tiny_model("mistral"), eviction=policy())
    folder = tiny_model("gemma3_text")
    full = LLM(folder, numerics="exact", block_size=BLOCK)
    windowed = policy(recent=8, budget=Budget(tokens=14))
    found = completions_of(folder, windowed, token_budget=13)[0]
    assert found == completions_of(folder, windowed, max_sequences=1)[0]
    assert found != [completion.token_ids for completion in full.generate(PROMPTS, max_tokens=26, ignore_eos=True)]
