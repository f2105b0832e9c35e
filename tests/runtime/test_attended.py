"""H2O: attention is added up in whole numbers, over every query since a slot was stored, whatever the schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.llm import LLM
from runtime.ops.attention_tiled import UNITS, add_shares
from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages
from runtime.params import SamplingParams
from tests.conftest import TinyModel
from tests.runtime._evictions import BLOCK, PROMPTS, masked_logits, masks, page_bytes, policy
from tests.runtime._watched import Watched

MORE = 26


def answers(llm: LLM) -> list[tuple[int, ...]]:
    found = [tuple(each.token_ids) for each in llm.generate(PROMPTS, max_tokens=MORE, ignore_eos=True)]
    llm.engine.check_integrity()
    assert llm.stats().pages.owned == llm.stats().pages.cached == llm.stats().pages.hits == 0
    return found


def heavy(shares_HTT: Tensor, stored: list[int], point: int, groups: int) -> list[set[int]]:
    """What 14 slots hold afterwards, by hand: 2 first, 5 last, and of those between the most attended to."""
    attended_GT = shares_HTT[:, :point].sum(1).view(groups, -1, shares_HTT.shape[2]).sum(1)
    between = stored[2:-5]
    return [
        {*stored[:2], *stored[-5:], *sorted(between, key=lambda at: -float(attended_T[at]))[:7]}
        for attended_T in attended_GT
    ]


def test_what_stays_is_what_full_matrices_say(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 13 tokens, four sequences at once: against whole matrices of attention, summed over their columns."""
    folder = tiny_model("llama")
    llm = LLM(folder, numerics="fast", dtype=torch.float32, block_size=BLOCK, token_budget=13, eviction=policy("h2o"))
    watched = Watched(monkeypatch, llm)
    completions = llm.generate(PROMPTS, max_tokens=MORE, ignore_eos=True)
    layers, groups = len(llm.config.layers), llm.config.layers[0].kv_heads
    checked = 0
    for sequence, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        ids, kept = [*prompt, *completion.token_ids], watched.kept[sequence]
        shares: list[Tensor] = []
        masked_logits(folder, llm.config, ids, masks(kept, layers, groups, len(ids)), shares)
        for layer in range(layers):
            stored, last = [[] for _ in range(groups)], 0
            for point in sorted(kept):
                for group in range(groups):
                    stored[group] += range(last, point)
                    wanted = heavy(shares[layer], stored[group], point, groups)[group]
                    stored[group] = [stored[group][slot] for slot in kept[point][layer][group].tolist()]
                    assert set(stored[group]) == wanted
                    checked += 1
                last = point
    assert checked > 50


def test_tokens_depend_on_nothing_but_prompt_and_policy(tiny_model: TinyModel) -> None:
    """Nothing is shared or found again; chunks, batches and preemptions change no bit."""
    folder, options = tiny_model("llama"), {"numerics": "exact", "block_size": BLOCK, "headroom_tokens": 0}
    pages = page_bytes(LLM(folder, numerics="exact").config) * 17 // 16  # 8 bytes beside 128 of each head
    found = []
    for more in ({"max_sequences": 1}, {"token_budget": 13}, {"token_budget": 64, "kv_bytes": 9 * pages}):
        llm = LLM(folder, **options, **more, eviction=policy("h2o"))
        found.append(answers(llm))
    assert llm.stats().preemptions > 2
    assert found[0] == found[1] == found[2]


def test_samples_of_one_prompt_share_no_page(tiny_model: TinyModel) -> None:
    """Each of three begins anew, and answers as if it were alone."""
    llm = LLM(tiny_model("llama"), numerics="exact", block_size=BLOCK, eviction=policy("h2o"))
    [completion, *_] = together = llm.generate(
        PROMPTS[0], SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    )
    assert len({tuple(each.token_ids) for each in together}) == 3
    llm.engine.check_integrity()
    rest = [*PROMPTS[0], *completion.token_ids]
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True))[
        0
    ].token_ids == tuple(rest[len(PROMPTS[0]) :])


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 3.0)])
def test_sums_do_not_depend_on_the_cut(window: int | None, softcap: float | None) -> None:
    """To the bit; and they are those of softmax in fp64."""
    heads, groups, width, tokens = 4, 2, 16, 150
    generator = torch.Generator().manual_seed(2)
    q_THD = torch.randn(tokens, heads, width, generator=generator) * 2
    k_TGD = torch.randn(tokens, groups, width, generator=generator)
    pages = Pages(torch.zeros(tokens // BLOCK + 4, BLOCK, groups, width))
    table = torch.randperm(len(pages.codes), generator=generator).tolist()
    found = []
    for cuts in ([0, tokens], [0, 1, 8, 77, 140, 141, tokens]):
        total_PBG = torch.full(pages.codes.shape[:3], 77, dtype=torch.int64)  # what others have left
        for start, end in zip(cuts, cuts[1:], strict=False):
            batch = AttentionBatch.build([start], [end - start], [start], [table], block_size=BLOCK)
            pages.write(k_TGD[start:end], batch.slot_T)
            add_shares(total_PBG, q_THD[start:end], pages, batch, scale=width**-0.5, window=window, softcap=softcap)
        slot_T = torch.tensor([table[at // BLOCK] * BLOCK + at % BLOCK for at in range(tokens)])
        found.append(total_PBG.flatten(0, 1)[slot_T])
    assert torch.equal(*found)
    score = torch.einsum("qgrd,kgd->grqk", q_THD.double().view(tokens, groups, -1, width), k_TGD.double()) * width**-0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - window)
    shares = score.masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(found[0].T / UNITS, shares.sum((1, 2)), atol=1e-5, rtol=1e-5, check_dtype=False)


def test_the_pool_counts_what_is_added_up(tiny_model: TinyModel, tmp_path: Path) -> None:
    llm = LLM(tiny_model("llama"), block_size=BLOCK, kv_bytes=1 << 20, kv_cache="int8", eviction=policy("h2o"))
    cache = llm.engine.runner.cache
    assert len(cache.attended) == 3
    assert llm.ledger.kv_pool_bytes == cache.pages * llm.engine.scheduler.pool.page.bytes == cache.bytes
    assert llm.ledger.kv_pool_bytes == llm.kv_tokens * (216 + 8 * 2 * 3) > (1 << 20) - llm.kv_tokens
