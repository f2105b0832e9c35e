"""Evictions on real layers: one policy and its prompts, and what is left as a mask on plain attention."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from kv_compress.eviction import Budget, EvictionSettings
from runtime.llm import LLM
from runtime.params import SamplingParams
from tests.runtime._naive import prompts_of
from tests.runtime._plain_llama import plain_logits

BLOCK = 4
EVERYWHERE = ("prefill_chunk", "prefill_end", "decode")
PROMPTS = prompts_of((45, 9, 30, 45), 320, seed=3)
PROMPTS[3][:30] = PROMPTS[0][:30]  # two begin alike


def policy(method: str = "snapkv", **changes) -> EvictionSettings:
    fields = {"method": method, "budget": Budget(tokens=14), "sinks": 2, "recent": 5, "every": 11, "when": EVERYWHERE}
    if changes.get("when") == ("prefill_end",):
        del fields["every"]
    return EvictionSettings(**fields | changes)


def page_bytes(config) -> int:
    return sum(2 * layer.kv_heads * layer.head_dim for layer in config.layers) * BLOCK * 4


def masks(kept: dict[int, list[Tensor]], layers: int, groups: int, tokens: int) -> Tensor:
    """Which key each query sees [layer, G, query, key], after what stayed at each point."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(layers, groups, 1, 1)
    for layer in range(layers):
        for group in range(groups):
            stored: list[int] = []
            for position in range(tokens):
                if position in kept:
                    stored = [stored[slot] for slot in kept[position][layer][group].tolist()]
                    gone = sorted(set(range(position)) - set(stored))
                    visible[layer, group, position:, gone] = False
                stored.append(position)
    return visible


def masked_logits(folder: Path, config, ids: list[int], visible: Tensor, shares: list[Tensor] | None = None) -> Tensor:
    """Logits [T, V] where all keys and values are kept and those that are gone are masked. `shares` gets each layer's
    attention [H, T, T]."""

    def attended(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = (z.repeat_interleave(repeats, dim=1) for z in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        hidden = ~visible[layer].repeat_interleave(repeats, dim=0)
        share = score.masked_fill(hidden, float("-inf")).softmax(-1)
        if shares is not None:
            shares.append(share)
        return torch.einsum("hqk,khd->qhd", share, v).flatten(1)

    return plain_logits(folder, config, ids, attended)


def completions_of(folder: Path, eviction: EvictionSettings, **options) -> tuple[list, SimpleNamespace]:
    llm = LLM(folder, numerics="exact", block_size=BLOCK, eviction=eviction, headroom_tokens=0, **options)
    found = [completion.token_ids for completion in llm.generate(PROMPTS, max_tokens=26, ignore_eos=True)]
    if "max_sequences" not in options:  # on pages of before
        again = [completion.token_ids for completion in llm.generate(PROMPTS, max_tokens=26, ignore_eos=True)]
        assert found == again
    llm.engine.check_integrity()
    stats = llm.stats()
    assert stats.pages.owned == 0
    return found, SimpleNamespace(preemptions=stats.preemptions, hits=stats.pages.hits)


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
