"""Eviction of keys and values: what a pool holds, how fast it goes, and how much a long prompt takes.

    python benchmarks/kv_eviction.py --model shared/data/models/tinystories-656k

Capacity: a pool of --sequences times the pages of one whole request; --requests requests of --prompt random tokens that
generate --generate more, all kept or a quarter of the prompt (snapkv, at the prompt's end and every 16 tokens).
Counted: the most sequences at work at a time. Timed: generated tokens per second from the first step to the last, both
in turns, the median of --rounds. Long prompts: the most pages owned at any time while prompts of --lengths tokens are
read with a budget of 512 tokens (keydiff) that is held every 512 tokens; the model's context is taken to be longer than
it is, since pages are counted and not words.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import tools
import torch

from kv_compress.eviction import Budget, EvictionSettings
from runtime.llm import LLM
from runtime.params import SamplingParams

BLOCK = 16
IDLE_LOAD = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "kv-eviction.json")
    asked = parser.parse_args()
    environment = tools.describe_machine() | {"threads": asked.threads, "load_before": os.getloadavg()[0]}
    torch.set_num_threads(asked.threads)
    result = {
        "environment": environment,
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "asked": {name: getattr(asked, name) for name in ("sequences", "requests", "prompt", "generate", "rounds")},
        "model": asked.model.name,
        "capacity": capacity(asked),
        "long_prompts": long_prompts(asked),
    }
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def capacity(asked: argparse.Namespace) -> dict:
    """All kept and a quarter kept, in turns."""
    quarter = EvictionSettings(method="snapkv", budget=Budget(tokens=asked.prompt // 4), every=16)
    runs: dict[str, list[dict]] = {"all": [], "quarter": []}
    for _ in range(asked.rounds):
        runs["all"].append(served(asked, None))
        runs["quarter"].append(served(asked, quarter))
    found = {
        name: {
            "pool_bytes": of[0]["pool_bytes"],
            "most_sequences": max(run["most_sequences"] for run in of),
            "preemptions": of[0]["preemptions"],
            "tokens_per_s": statistics.median(run["tokens_per_s"] for run in of),
            "all_tokens_per_s": [run["tokens_per_s"] for run in of],
        }
        for name, of in runs.items()
    }
    return found | {
        "sequences_ratio": found["quarter"]["most_sequences"] / found["all"]["most_sequences"],
        "speed_ratio": found["quarter"]["tokens_per_s"] / found["all"]["tokens_per_s"],
    }


def served(asked: argparse.Namespace, eviction: EvictionSettings | None) -> dict:
    """All requests through one pool."""
    page_bytes = LLM(asked.model, block_size=BLOCK, max_sequences=1).engine.scheduler.pool.page.bytes
    pages = asked.sequences * -(-(asked.prompt + asked.generate - 1) // BLOCK)
    llm = LLM(asked.model, block_size=BLOCK, kv_bytes=pages * page_bytes, prefix_cache=False, eviction=eviction)
    params = SamplingParams(temperature=0.0, max_tokens=asked.generate, ignore_eos=True)
    rng = random.Random(0)
    for _ in range(asked.requests):
        llm.add([rng.randrange(llm.config.vocab) for _ in range(asked.prompt)], params)
    most, started = 0, time.perf_counter()
    while llm.has_work:
        llm.step()
        most = max(most, llm.stats().running)
    seconds = time.perf_counter() - started
    return {
        "pool_bytes": llm.ledger.kv_pool_bytes,
        "most_sequences": most,
        "preemptions": llm.stats().preemptions,
        "tokens_per_s": round(asked.requests * asked.generate / seconds, 1),
    }


def long_prompts(asked: argparse.Namespace) -> list[dict]:
    """The most pages owned while one prompt is read, for each length."""
    eviction = EvictionSettings(
        method="keydiff", budget=Budget(tokens=512), every=512, when=("prefill_chunk", "prefill_end", "decode")
    )
    rng, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        for source in asked.model.iterdir():
            (Path(folder) / source.name).symlink_to(source.resolve())
        config = Path(folder) / "config.json"
        settings = json.loads(config.read_text()) | {"max_position_embeddings": max(asked.lengths) + 16}
        config.unlink()
        config.write_text(json.dumps(settings))
        for length in asked.lengths:
            llm = LLM(
                folder, block_size=BLOCK, max_sequences=1, prefix_cache=False, kv_bytes="64MiB", eviction=eviction
            )
            llm.add([rng.randrange(llm.config.vocab) for _ in range(length)], SamplingParams(max_tokens=8))
            most, started = 0, time.perf_counter()
            while llm.has_work:
                llm.step()
                most = max(most, llm.stats().pages.owned)
            page = llm.engine.scheduler.pool.page
            found.append(
                {
                    "tokens": length,
                    "most_pages": most,
                    "most_bytes": most * page.bytes,
                    "bytes_without": -(-length // BLOCK) * page.bytes,
                    "seconds": round(time.perf_counter() - started, 2),
                }
            )
    return found


def render(results: dict) -> str:
    """Sequences, speed and pages."""
    capacity, asked = results["capacity"], results["asked"]
    whole, quarter = capacity["all"], capacity["quarter"]
    lines = [
        f"{results['model']}, {asked['requests']} requests of {asked['prompt']} tokens that generate "
        f"{asked['generate']}, in a pool of {whole['pool_bytes']:,} bytes: {whole['most_sequences']} sequences at once "
        f"if all is kept, {quarter['most_sequences']} with a quarter (snapkv), {capacity['sequences_ratio']:.1f} times "
        "as many.",
    ]
    load = results["environment"]["load_before"]
    beside = f", in turns, beside other work (load {load:.1f})" if load > IDLE_LOAD else ""
    lines.append(f"Tokens a second at saturation: {capacity['speed_ratio']:.2f} times as many{beside}.")
    lines += ["", "| prompt | most bytes of pages, budget 512 (keydiff) | all kept |", "|--:|--:|--:|"]
    lines += [
        f"| {found['tokens']:,} | {found['most_bytes']:,} | {found['bytes_without']:,} |"
        for found in results["long_prompts"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
