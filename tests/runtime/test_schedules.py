"""Exact numerics over random schedules: whatever is chunked, cached, preempted or batched, the same bits come out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from runtime.engine import Engine, EngineSettings
from runtime.loader import load
from runtime.memory import allocate
from runtime.models.decoder import Decoder
from runtime.params import SamplingParams
from runtime.runner import Runner
from runtime.scheduler import SchedulerSettings
from tests.conftest import TinyModel
from tests.runtime.fake_model import Told

MAX_LENGTH = 64
SEEDS = {"llama": (1,), "gemma2": (2,), "mistral": (3,), "qwen3_moe": (4,)}
TOP = 40  # logits that are compared one by one; the rest counts in the sum that makes them probabilities
CONTIGUOUS: dict[str, Any] = {"block_size": MAX_LENGTH, "max_sequences": 1, "prefix_cache": False}
SCHEDULES: dict[str, dict[str, Any]] = {
    "all on": {"token_budget": 48},
    "no chunking": {"token_budget": 48, "chunked_prefill": False},
    "no prefix cache": {"token_budget": 48, "prefix_cache": False},
    "no batching": {"max_sequences": 1},
    "small chunks": {"token_budget": 7},
    "preemption": {"token_budget": 24, "pages": 17, "headroom_tokens": 0},
    "preemption, neither chunks nor prefix cache": {
        "pages": 17,
        "headroom_tokens": 0,
        "chunked_prefill": False,
        "prefix_cache": False,
    },
}


def engine_of(model: Decoder, *, block_size: int = 4, pages: int | None = None, **scheduler: Any) -> Engine:
    settings = SchedulerSettings(**scheduler)
    cache, pool, _ = allocate(
        model, block_size, MAX_LENGTH, settings, kv_bytes=(pages or 256) * _page(model, block_size)
    )
    return Engine(Runner(model, cache), pool, None, EngineSettings(MAX_LENGTH, scheduler=settings))


def _page(model: Decoder, block_size: int) -> int:
    return block_size * sum(8 * layer.kv_heads * layer.head_dim for layer in model.config.layers)


class Requests:
    """Prompts of which some share their beginning, greedy and sampled, each coming at a step of its own."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        drawn = random.Random(seed)
        shared = [drawn.randrange(vocabulary) for _ in range(24)]
        self.arrivals: list[tuple[int, list[int], SamplingParams]] = []
        for number in range(9):
            own = [drawn.randrange(vocabulary) for _ in range(drawn.choice([1, 2, 9, 20]))]
            prompt = shared[: drawn.choice([0, 9, 16, 24])] + own
            params = SamplingParams(
                temperature=drawn.choice([0.0, 0.0, 1.0]),
                top_p=0.9,
                seed=number,
                max_tokens=drawn.choice([1, 6, 20]),
                n=drawn.choice([1, 1, 2]),
                logprobs=TOP,
                prompt_logprobs=drawn.choice([None, None, 3]),
                prompt_logprobs_start=drawn.choice([1, 12]),
                ignore_eos=True,
            )
            self.arrivals.append((drawn.randrange(12), prompt, params))

    def run(self, engine: Engine) -> dict[tuple[str, int], Told]:
        told: dict[tuple[str, int], Told] = {}
        waiting = sorted(enumerate(self.arrivals), key=lambda item: item[1][0])
        step = 0
        while waiting or engine.has_work:
            while waiting and waiting[0][1][0] <= step:
                number, (_, prompt, params) = waiting.pop(0)
                engine.add(prompt, params, f"r{number}")
            for update in engine.step():
                told.setdefault((update.request, update.index), Told()).take(update)
            engine.check_integrity()
            step += 1
        return told


@pytest.mark.parametrize("family", SEEDS)
def test_schedules_change_no_bit(tiny_model: TinyModel, family: str) -> None:
    """Non-determinism: tokens, and all logits to the bit, as with one sequence at a time in a contiguous cache."""
    model = load(tiny_model(family), numerics="exact")
    preemptions = hits = 0
    for seed in SEEDS[family]:
        requests = Requests(seed, model.config.vocab)
        expected = requests.run(engine_of(model, **CONTIGUOUS))
        for label, options in SCHEDULES.items():
            engine = engine_of(model, **options)
            told = requests.run(engine)
            assert told.keys() == expected.keys()
            for key, result in told.items():
                assert result.token_ids == expected[key].token_ids, (label, key)
                assert result == expected[key], (label, key)
            preemptions += engine.stats().preemptions
            hits += engine.stats().pages.hits
    assert preemptions > 0
    assert hits > 0


def test_logits_are_those_of_transformers_with_its_own_cache(tiny_model: TinyModel) -> None:
    """A paged, chunked, preempted run against token by token over a contiguous cache."""
    folder = tiny_model("llama")
    requests = Requests(5, 320)
    told = requests.run(engine_of(load(folder, numerics="exact"), **SCHEDULES["preemption"]))
    reference = Checkpoint.open(folder).build_model(torch.float32)
    for number, (_, prompt, params) in enumerate(requests.arrivals):
        for index in range(params.n):
            result = told[f"r{number}", index]
            assert _worst(reference, prompt, result) <= 1e-5


@torch.inference_mode()
def _worst(reference: Any, prompt: list[int], result: Told) -> float:
    """Largest difference between reported log-probabilities and those of the model fed one token at a time."""
    output = reference(torch.tensor([prompt]), use_cache=True)
    worst = 0.0
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        expected_V = output.logits[0, -1].log_softmax(-1)
        worst = max(worst, *(abs(float(expected_V[id]) - value) for id, value in entry.top))
        output = reference(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    return worst
