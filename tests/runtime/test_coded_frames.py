"""Whole pages that are coded, on real layers: each query attends to just the mixture that its position says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core.errors import InputError
from kv_compress.eviction import Budget, EvictionSettings
from kv_compress.policy import Coding, KVPolicy, LayerPolicy
from runtime.llm import LLM
from runtime.params import SamplingParams
from runtime.scheduler import RequestTooLong
from runtime.step import Recoding
from runtime.trace import replay
from tests.conftest import TinyModel
from tests.runtime._naive import prompts_of
from tests.runtime._plain_llama import plain_logits
from tests.runtime._watched import Watched

BLOCK, SINKS, RECENT = 4, 3, 5  # sinks are a whole page
POLICY = KVPolicy.uniform("int4", 3, keys="channel", sinks=SINKS, recent=RECENT)
EIGHT = LayerPolicy(Coding("int8", per="channel"), Coding("int4"))
MIXED = KVPolicy((*POLICY.layers[:1], EIGHT, LayerPolicy(Coding("int4"), Coding("int8"))), None, SINKS, RECENT)
TOKENS = {"int4": 20, "mixed": 16}  # of a coded page: 3,072 bytes, at 2 · (8 + 8 + 4) and 2 · 16 · 4 a layer …
PROMPTS = prompts_of((45, 9, 30, 61), 320, seed=3)
PROMPTS[3][:40] = PROMPTS[0][:40]  # two begin alike
ASKED = {"max_tokens": 26, "ignore_eos": True}


def rounded(x_NGD: Tensor, coding: Coding, *, keys: bool) -> Tensor:
    """A block of keys or values as codes leave it, by plain formulas."""
    bits = 8 if coding.codec == "int8" else 4
    if not keys and bits == 8 or keys and coding.per == "token" and bits == 8:
        scale = (x_NGD.abs().amax(-1, keepdim=True) / 127).half().float()
        return (x_NGD / scale).round() * scale
    over = 0 if coding.per == "channel" else -1
    low, high = x_NGD.amin(over, keepdim=True), x_NGD.amax(over, keepdim=True)
    lowest = low.half().float()
    if over == 0:  # rounded outwards, so that every number lies between codes
        lowest = torch.where(lowest > low, torch.nextafter(low.half(), torch.tensor(-torch.inf).half()).float(), lowest)
    exact = (high - (lowest if over == 0 else low)) / (2**bits - 1)
    scale = exact.half().float()
    if over == 0:
        up = torch.nextafter(exact.half(), torch.tensor(torch.inf).half()).float()
        scale = torch.where(scale < exact, up, scale)
    return ((x_NGD - lowest) / scale).round().clamp(0, 2**bits - 1) * scale + lowest


def expected_logits(folder: Path, config, ids: list[int], policy: KVPolicy, page: int) -> Tensor:
    """A query at p sees block m rounded once `RECENT` tokens behind it are stored: [T, V]."""

    def attended(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, of = [], policy.layers[layer]
        k, v = k.clone(), v.clone()
        for position in range(len(ids)):
            for begin in range(BLOCK, position, page):  # what is rounded once stays so
                if begin + page + RECENT == position:
                    block = slice(begin, begin + page)
                    k[block], v[block] = rounded(k[block], of.keys, keys=True), rounded(v[block], of.values, keys=False)
            seen = [z[: position + 1].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for z in (k, v)]
            share = (torch.einsum("hd,khd->hk", q[position], seen[0]) / q.shape[2] ** 0.5).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", share, seen[1]).flatten())
        return torch.stack(rows)

    return plain_logits(folder, config, ids, attended)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("name", list(TOKENS))
def test_queries_see_the_mixture_that_their_position_says(
    name: str, numerics: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, policy = tiny_model("llama"), {"int4": POLICY, "mixed": MIXED}[name]
    llm = LLM(
        folder, numerics=numerics, dtype=torch.float32, block_size=BLOCK, token_budget=24, kv_cache=policy,
        device="cpu",
    )  # fmt: skip
    assert llm.engine.scheduler.points.page_tokens == TOKENS[name]
    watched = Watched(monkeypatch, llm)
    completions = llm.generate(PROMPTS, **ASKED)
    for sequence, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        ids = [*prompt, *completion.token_ids]
        wanted = expected_logits(folder, llm.config, ids, policy, TOKENS[name])
        full = expected_logits(folder, llm.config, ids, policy, 1 << 20)
        found = watched.logits[sequence]
        assert sorted(found) == list(range(len(prompt) - 1, len(ids) - 1))
        errors = torch.tensor([float((row - wanted[at]).abs().max()) for at, row in found.items()])
        losses = [float((row - full[at]).abs().max()) for at, row in found.items()]
        # A number that lies between two codes may fall to either side, and all rows behind it see that.
        assert errors.median() < 1e-4 and errors.max() < 0.02
        assert (max(losses) > 20 * errors.max()) == (len(ids) > BLOCK + TOKENS[name] + RECENT)


def test_tokens_depend_on_nothing_that_an_engine_does(tiny_model: TinyModel) -> None:
    """Batches, chunks, preemption, prefix hits and n > 1, in exact numerics: to the bit."""
    folder = tiny_model("llama")
    options = {"numerics": "exact", "block_size": BLOCK, "kv_cache": POLICY, "headroom_tokens": 0}
    asked = ASKED | {"logprobs": 1}

    def told(llm: LLM) -> list:
        twice = [[(c.token_ids, c.logprobs) for c in llm.generate(PROMPTS, **asked)] for _ in range(2)]
        assert twice[0] == twice[1]  # on pages of before
        llm.engine.check_integrity()
        assert llm.stats().pages.owned == 0
        return twice[0]

    alone = LLM(folder, max_sequences=1, prefix_cache=False, **options)
    wanted = told(alone)
    chunked = LLM(folder, token_budget=13, **options)
    tight = LLM(folder, token_budget=64, kv_bytes=18 * 3072, **options)
    assert told(chunked) == told(tight) == wanted
    assert chunked.stats().pages.hits > 8 and tight.stats().preemptions > 1
    before = chunked.stats().pages.hit_tokens
    chunked.generate(PROMPTS[3:], **ASKED)  # 61 tokens: the sinks, two coded pages, and four full ones up to 60
    assert chunked.stats().pages.hit_tokens - before == 60
    [one] = alone.generate(PROMPTS[:1], **ASKED)
    both = tight.generate(PROMPTS[:1], n=2, **ASKED)
    assert [each.token_ids for each in both] == [one.token_ids] * 2


def test_what_fits_is_known_and_what_is_allocated(tiny_model: TinyModel) -> None:
    """A pool of 14 frames of 3,072 bytes: the longest sequence goes in, one token more is refused."""
    llm = LLM(tiny_model("llama"), block_size=BLOCK, kv_bytes=14 * 3072 + 5, kv_cache=POLICY, dtype=torch.float32)
    assert llm.ledger.kv_pool_bytes == llm.engine.runner.cache._memory.nbytes == 14 * 3072
    assert llm.engine.scheduler.pool.page.name == "float32 or int4"
    usual = LLM(
        tiny_model("llama"), block_size=BLOCK, kv_cache=POLICY, dtype=torch.float32, max_length=168, max_sequences=2
    )
    assert usual.ledger.kv_pool_bytes == 2 * llm.ledger.kv_pool_bytes  # by itself no more than can be used
    # In the end the sinks' frame, 7 coded ones and 6 full ones; before the last was coded it was as many.
    assert llm.kv_tokens == 4 + 7 * 20 + 6 * 4 == 168
    owned = []
    llm.engine.add([5] * 160, SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    while llm.engine.has_work:
        llm.engine.step()
        owned.append(llm.stats().pages.owned)
    assert max(owned) == 14
    with pytest.raises(RequestTooLong, match="where pages are coded"):
        llm.generate([[5] * 160], max_tokens=10)
    full = LLM(tiny_model("llama"), block_size=BLOCK, kv_bytes=14 * 3072, dtype=torch.float32, device="cpu")
    assert full.kv_tokens == 56


def test_a_recording_is_replayed(tiny_model: TinyModel, tmp_path: Path) -> None:
    with LLM(tiny_model("llama"), block_size=BLOCK, kv_cache=POLICY, record=tmp_path / "trace", device="cpu") as llm:
        llm.generate(PROMPTS, **ASKED)
        pages = llm.engine.scheduler.points.page_tokens
    done = [each for _, step in replay(tmp_path / "trace") for each in step.compressions]
    assert len(done) == sum((len(prompt) + 25 - 4 - RECENT) // pages for prompt in PROMPTS)
    assert all(isinstance(each, Recoding) and len(each.source) == pages // BLOCK for each in done)


def test_single_tokens_cannot_be_dropped(tiny_model: TinyModel) -> None:
    with pytest.raises(InputError, match="of which eviction cannot drop single tokens"):
        LLM(tiny_model("llama"), kv_cache=POLICY, eviction=EvictionSettings(budget=Budget(tokens=64)))
