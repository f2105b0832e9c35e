"""Evictions that leave unequal numbers of slots, on real layers: what is left is attended to as if the rest were
masked, and pages come back as foretold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.core.errors import UsageError
from kv_compress.eviction import Budget
from kv_compress.policy import Coding, KVPolicy, LayerPolicy
from runtime.llm import LLM
from runtime.ops.backend import torch_only
from runtime.small_steps import SmallSteps
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

METHODS = ("adakv", "pyramidkv")
LAYERS, HEADS = 3, 2  # of the tiny model


@pytest.mark.parametrize("method", METHODS)
def test_what_is_gone_is_as_if_masked(method: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In exact numerics, in fast ones through C, and through torch; with chunks behind a point that are long and short,
    and sequences that lie in whole pages beside others that do not."""
    folder = tiny_model("llama")
    for numerics, budget, native in (("exact", 24, True), ("fast", 200, True), ("fast", 24, False)):
        options = {"numerics": numerics, "dtype": torch.float32, "block_size": BLOCK, "token_budget": budget}
        llm = LLM(folder, **options, eviction=policy(method))
        watched = Watched(monkeypatch, llm)
        if native:
            completions = llm.generate(PROMPTS, max_tokens=26, ignore_eos=True)
        else:
            with torch_only():
                completions = llm.generate(PROMPTS, max_tokens=26, ignore_eos=True)
        monkeypatch.undo()
        for sequence, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
            ids = [*prompt, *completion.token_ids]
            kept = watched.kept[sequence]
            grid = [*range(11, len(prompt), 11), *range(len(prompt), len(ids) - 1, 11)]
            assert sorted(kept) == [p for p in grid if p > 14]
            for position, chosen in kept.items():
                counts = [[len(of_head) for of_head in of_layer] for of_layer in chosen]
                sums = [sum(of_layer) for of_layer in counts]
                # 7 always stay and 7 more in the mean: 7 ± 7 * 19 / 20, but in 20 slots there are 13 more at the most.
                falling = [40, 28, 16] if position == 20 else [42, 28, 14]
                assert sums == (falling if method == "pyramidkv" else [28] * 3)
                assert method != "pyramidkv" or all(first == second for first, second in counts)
            expected = masked_logits(folder, llm.config, ids, masks(kept, LAYERS, HEADS, len(ids)))
            plain = masked_logits(folder, llm.config, ids, masks({}, LAYERS, HEADS, len(ids)))
            found = watched.logits[sequence]
            assert sorted(found) == list(range(len(prompt) - 1, len(ids) - 1))
            worst = max(float((logits - expected[at]).abs().max()) for at, logits in found.items())
            assert worst < 1e-4
            assert max(float((logits - plain[at]).abs().max()) for at, logits in found.items()) > 100 * worst
        has_c = native and isinstance(llm.engine.runner.whole, SmallSteps)
        assert (watched.through_c > 5) == (has_c and numerics == "fast")
        if method == "adakv":  # or equal counts would pass, too
            assert any(len(a) != len(b) for at in watched.kept.values() for each in at.values() for a, b in each)


def coded(layers: int, codec: str) -> KVPolicy:
    """Scales of fp8 differ by layer and head, so that each must be its content's wherever that lies."""
    each = []
    for layer in range(layers):
        scale = (0.02 + 0.01 * layer, 0.03 + 0.01 * layer) if codec == "fp8" else ()
        each.append(LayerPolicy(Coding(codec, codec == "int4", scale), Coding(codec, False, scale)))
    return KVPolicy(tuple(each))


@pytest.mark.parametrize(("method", "codec"), [("adakv", "full"), ("adakv", "int4"), ("pyramidkv", "full")])
def test_tokens_depend_on_nothing_but_prompt_and_policy(method: str, codec: str, tiny_model: TinyModel) -> None:
    folder, eviction, kept = tiny_model("llama"), policy(method), coded(LAYERS, codec)
    page = LLM(folder, numerics="exact", block_size=BLOCK, kv_cache=kept).engine.scheduler.pool.page.bytes
    alone, _ = completions_of(folder, eviction, max_sequences=1, prefix_cache=False, kv_cache=kept)
    batched, cached = completions_of(folder, eviction, token_budget=13, kv_cache=kept)
    tight, pressed = completions_of(folder, eviction, token_budget=64, kv_bytes=9 * page, kv_cache=kept)
    assert alone == batched == tight
    assert cached.hits > 8 and pressed.preemptions > 1


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_codes_are_read_with_what_is_theirs(codec: str, tiny_model: TinyModel) -> None:
    """Where each head keeps equally many, pieces of coded pages give the logits that whole pages give, but for codes
    that come out one higher or lower."""
    folder, few = tiny_model("llama"), {"budget": Budget(ratio=0.9), "when": ("prefill_end",)}
    for numerics in ("exact", "fast"):
        options = {"numerics": numerics, "dtype": torch.float32, "block_size": BLOCK, "kv_cache": coded(LAYERS, codec)}
        evictions = policy("adakv", alpha_safeguard=1.0, **few), policy("snapkv", **few)
        llms = [LLM(folder, **options, eviction=eviction) for eviction in evictions]
        completions = [llm.generate(PROMPTS, max_tokens=12, ignore_eos=True, logprobs=1) for llm in llms]
        llms[0].engine.check_integrity()
        for ours, theirs in zip(*completions, strict=True):
            assert ours.token_ids == theirs.token_ids
            for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert abs(one.logprob - other.logprob) < (1e-4 if numerics == "exact" else 2e-3)


def test_samples_of_one_request_are_those_of_requests_of_their_own(tiny_model: TinyModel) -> None:
    """Siblings begin anew where their parent's eviction cannot be shared."""
    folder, settings = tiny_model("llama"), {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True, "seed": 7}
    found = []
    for most in (8, 1):
        llm = LLM(folder, numerics="exact", block_size=BLOCK, eviction=policy("adakv"), max_sequences=most)
        found.append([c.token_ids for c in llm.generate([PROMPTS[0], PROMPTS[2]], n=3, **settings)])
        llm.engine.check_integrity()
        assert llm.stats().pages.owned == 0
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) == 6


def subpages_after(counts: list[int], tokens: int) -> Iterator[int]:
    """Pieces held after each token behind an eviction that left so many slots in each layer and head."""
    for more in range(1, tokens):
        yield sum(-(-(count + more) // BLOCK) for count in counts)


@pytest.mark.parametrize("method", METHODS)
def test_pages_come_back_as_foretold(method: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_model("llama"), block_size=BLOCK, prefix_cache=False, eviction=policy(method, when=("prefill_end",)))
    watched = Watched(monkeypatch, llm)
    engine, pages = llm.engine, llm.engine.scheduler.pool.pages
    engine.add(PROMPTS[0], params(26))
    held = []
    while engine.has_work:
        engine.step()
        held.append(pages - llm.stats().pages.free)
        groups = engine.scheduler.pool.groups
        assert groups is not None and (not held[-1] or groups.subpages.free < groups.columns)
    [chosen] = watched.kept[0].values()
    counts = [len(of_head) for of_layer in chosen for of_head in of_layer]
    pieces = [sum(-(-count // BLOCK) for count in counts), *subpages_after(counts, 26)]
    assert held == [*(-(-count // (LAYERS * HEADS)) for count in pieces[:-1]), 0]
    assert held[0] < 12  # of the prompt


def test_pages_do_not_grow_with_the_prompt(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A pool of budget and chunk, and a page that unequal counts may waste, serves prompts of any length."""
    folder = edited(tiny_model("llama"), tmp_path / "long", {"max_position_embeddings": 8192})
    for method in METHODS:
        peaks = []
        for length in (200, 1500):
            eviction = policy(method, budget=Budget(tokens=32), every=64)
            llm = LLM(folder, block_size=BLOCK, eviction=eviction, kv_bytes=25 * page_bytes(LLM(folder).config))
            llm.engine.add(prompts_of((length,), 320)[0], params(4))
            owned = []
            while llm.engine.has_work:
                llm.engine.step()
                owned.append(llm.stats().pages.owned)
            peaks.append(max(owned))
        assert peaks == [25, 25]


def test_layers_that_differ_are_refused(tiny_model: TinyModel) -> None:
    mixed = KVPolicy((LayerPolicy(Coding("int8"), Coding("int8")), *[LayerPolicy()] * (LAYERS - 1)))
    with pytest.raises(UsageError, match="layers cannot keep unequal numbers"):
        LLM(tiny_model("llama"), kv_cache=mixed, eviction=policy("adakv"))
