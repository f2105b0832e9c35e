"""Continuous against static batching, and a long prompt among decodes, on real steps of the runtime.

    python benchmarks/batching.py --work DIR [--shape 135m] [--runs 3] [--out FILE]

Random weights (or the bundled demo model), greedy, end tokens ignored. Requests of skewed lengths (prompts of 8 to 48
tokens, outputs exponential, mean 32), at most 16 at a time: `continuous`, where who is done makes room at once;
`padded`, where 16 go on until the longest of them is done, as in a tensor of one batch; `leaving`, where who is done
leaves and nobody joins until all are done. Then a prompt of 4,096 tokens comes among 16 decodes: each step is the gap
between two tokens of all of them, over the median of 30 steps before it came; with chunks of several sizes and whole.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import tools
from make_models import SHAPES, make_model
from workloads import Request, skewed, tokens_of

from runtime.llm import LLM
from runtime.params import SamplingParams

BATCH = 16
CONTEXT_TOKENS = 8192
STEADY_STEPS = 30


def prepare(shape: str, work: Path) -> Path:
    if shape == "demo":
        return tools.REPOSITORY / "compress" / "demo" / "model"
    folder = work / f"{shape}-{CONTEXT_TOKENS}"
    if not (folder / "tokenizer_config.json").exists():
        make_model(SHAPES[shape], folder, seed=0, context_tokens=CONTEXT_TOKENS)
    return folder


def enter(llm: LLM, requests: list[Request]) -> None:
    for prompt, tokens in requests:
        llm.add(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))


def finish(llm: LLM, requests: list[Request]) -> None:
    enter(llm, requests)
    while llm.has_work:
        llm.step()


def continuous(llm: LLM, requests: list[Request]) -> None:
    finish(llm, requests)


def padded(llm: LLM, requests: list[Request]) -> None:
    for at in range(0, len(requests), BATCH):
        batch = requests[at : at + BATCH]
        longest = max(tokens for _, tokens in batch)
        finish(llm, [(prompt, longest) for prompt, _ in batch])


def leaving(llm: LLM, requests: list[Request]) -> None:
    for at in range(0, len(requests), BATCH):
        finish(llm, requests[at : at + BATCH])


WAYS: tuple[Callable[[LLM, list[Request]], None], ...] = (continuous, padded, leaving)


def compare_batching(model: Path, count: int, runs: int) -> dict[str, object]:
    """Tokens a second that were asked for, each way, in turn."""
    llm = LLM(model, max_sequences=BATCH, prefix_cache=False, max_length=256)
    requests = skewed(count, np.random.default_rng(0), llm.config.vocab, mean_tokens=32)
    finish(llm, [([5, 6, 7], 4)] * BATCH)
    seconds: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for _ in range(runs):
        for way in WAYS:
            started = time.perf_counter()
            way(llm, requests)
            seconds[way.__name__].append(time.perf_counter() - started)
    took = {name: median(each) for name, each in seconds.items()}
    return {
        "requests": count,
        "batch": BATCH,
        "seconds": seconds,
        "tokens_per_second": {name: tokens_of(requests) / each for name, each in took.items()},
        "continuous_over_padded": took["padded"] / took["continuous"],
        "continuous_over_leaving": took["leaving"] / took["continuous"],
    }


def long_prompt(model: Path, prompt_tokens: int, chunk: int | None) -> dict[str, object]:
    """Gaps between the tokens of 16 requests while a prompt is read, `chunk` tokens in a step (None: whole)."""
    steps = STEADY_STEPS + 8 + -(-prompt_tokens // (chunk or prompt_tokens))
    settings = {"token_budget": BATCH + (chunk or prompt_tokens), "chunked_prefill": chunk is not None}
    length = max(prompt_tokens, steps + 8) + 16
    llm = LLM(model, max_sequences=BATCH + 1, prefix_cache=False, max_length=length, **settings)
    draw = np.random.default_rng(0)
    enter(llm, [(draw.integers(3, llm.config.vocab, 8).tolist(), steps) for _ in range(BATCH)])
    while llm.stats().running < BATCH:
        llm.step()
    gaps_s = [seconds_of_step(llm) for _ in range(STEADY_STEPS)]
    steady_s = median(gaps_s)
    late = llm.add(draw.integers(3, llm.config.vocab, prompt_tokens).tolist(), SamplingParams(max_tokens=4))
    gaps_s = []
    while True:
        started = time.perf_counter()
        updates = llm.step()
        gaps_s.append(time.perf_counter() - started)
        if any(update.request == late for update in updates):
            break
    return {
        "chunk_tokens": chunk,
        "prompt_tokens": prompt_tokens,
        "steady_gap_s": steady_s,
        "largest_over_steady": max(gaps_s) / steady_s,
        "p95_over_steady": float(np.percentile(gaps_s, 95)) / steady_s,
        "first_token_s": sum(gaps_s),
        "steps": len(gaps_s),
    }


def seconds_of_step(llm: LLM) -> float:
    started = time.perf_counter()
    llm.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="135m", choices=("demo", *SHAPES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "batching.json")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    load = os.getloadavg()[0]
    model = prepare(asked.shape, asked.work.resolve())
    prompt_tokens = 400 if asked.shape == "demo" else 4096  # the demo model's limit is 512
    result = {
        "environment": tools.describe_machine() | {"threads": asked.threads, "load_before": load},
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "shape": asked.shape,
        "batching": compare_batching(model, asked.requests, asked.runs),
        "long_prompt": [long_prompt(model, prompt_tokens, chunk) for chunk in (*asked.chunks, None)],
    }
    result["gates"] = gates(result)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def gates(result: dict) -> dict[str, bool]:
    """What was promised, and whether it is so."""
    *chunked, whole = result["long_prompt"]
    return {
        "continuous at least 2 x static batching": result["batching"]["continuous_over_padded"] >= 2,
        "largest gap with chunks at most 1.5 x": min(one["largest_over_steady"] for one in chunked) <= 1.5,
        "largest gap without chunks at least 5 x": whole["largest_over_steady"] >= 5,
    }


if __name__ == "__main__":
    main()
