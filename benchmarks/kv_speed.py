"""Decode steps over coded keys and values against the same over full ones, one process, a step of each in turn.

    python benchmarks/kv_speed.py --model shared/data/models/stories-7m [--prompt 384] [--steps 100]

Each codec has an engine of its own with the same requests of random tokens; once all prompts are read, every round
times one step of each. Figures are medians over the rounds, and the median of the ratios to the full cache within a
round, so that what else the machine does falls on all alike. fp32; whole-model steps are used where they cover a codec.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

import tools
import torch

from runtime.llm import LLM
from runtime.params import SamplingParams

CODECS = ("full", "int8", "int4", "fp8")
IDLE_LOAD = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "kv-speed.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    environment = tools.describe_machine() | {"threads": asked.threads, "load_before": os.getloadavg()[0]}
    result = {
        "environment": environment,
        "protocol": {"model": asked.model.name, "prompt_tokens": asked.prompt, "rounds": asked.steps},
        "batches": [measure(asked, batch) for batch in asked.batches],
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(render(result))


def measure(asked: argparse.Namespace, batch: int) -> dict:
    """Steps of all codecs with so many sequences."""
    engines = {codec: ready(asked, batch, codec) for codec in CODECS}
    seconds: dict[str, list[float]] = {codec: [] for codec in CODECS}
    for number in range(asked.steps):
        order = CODECS[number % len(CODECS) :] + CODECS[: number % len(CODECS)]
        for codec in order:
            started = time.perf_counter()
            engines[codec].step()
            seconds[codec].append(time.perf_counter() - started)
    return {
        "batch": batch,
        "codecs": {
            codec: {
                "token_bytes": engines[codec].engine.scheduler.pool.page.bytes // 16,
                "median_ms": 1000 * statistics.median(found),
                "over_full": statistics.median(a / b for a, b in zip(found, seconds["full"], strict=True)),
            }
            for codec, found in seconds.items()
        },
    }


def ready(asked: argparse.Namespace, batch: int, codec: str) -> LLM:
    """An engine whose sequences have all read their prompts."""
    llm = LLM(
        asked.model, dtype=torch.float32, device="cpu", kv_cache=codec, max_sequences=batch, prefix_cache=False,
        kv_bytes="256MiB",
    )  # fmt: skip
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=asked.steps + 8, ignore_eos=True)
    for _ in range(batch):
        llm.add([rng.randrange(llm.config.vocab) for _ in range(asked.prompt)], params)
    while llm.stats().running < batch or llm.stats().computed_tokens < batch * asked.prompt:
        llm.step()
    llm.step()
    return llm


def render(result: dict) -> str:
    """Times of a step as multiples of the full cache's."""
    found = {entry["batch"]: entry["codecs"] for entry in result["batches"]}
    lines = ["| | bytes of a token | " + " | ".join(f"step at batch {batch}" for batch in found) + " |"]
    lines.append("|---|--:|" + "--:|" * len(found))
    for codec in CODECS:
        cells = [f"{of[codec]['over_full']:.2f} x ({of[codec]['median_ms']:.2f} ms)" for of in found.values()]
        lines.append(f"| {codec} | {found[min(found)][codec]['token_bytes']:,} | " + " | ".join(cells) + " |")
    load = result["environment"]["load_before"]
    return "\n".join(lines + ([f"\nOther work went on beside it (load {load:.1f})."] if load > IDLE_LOAD else []))


if __name__ == "__main__":
    main()
