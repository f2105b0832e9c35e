"""Times steps of the runtime on this machine and fits the simulator's model of them.

    python benchmarks/make_models.py 135m DIR
    python benchmarks/step_time.py --model DIR --name step-time-135m [--device cuda --numerics fast]

Decodes of 1 to 64 sequences, prefill chunks of 16 to 512 tokens, and both in one step, each behind 0 to 1,024 stored
slots, one by one in turn; the median of --rounds. The model is base_s + token_s per token + slot_s per stored slot, by
least squares of the relative error.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import tools
import torch

from runtime.cache import KVCache
from runtime.loader import load
from runtime.runner import Runner
from runtime.simulator import StepTime
from runtime.small_steps import SmallSteps
from runtime.step import Row, Step

PAGE_TOKENS = 16
SHAPES = [
    *((decodes, 0, stored) for decodes in (1, 4, 16, 64) for stored in (0, 256, 1024)),
    *((0, chunk, stored) for chunk in (16, 64, 256, 512) for stored in (0, 1024)),
    *((16, chunk, 512) for chunk in (16, 64, 256)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the JSON under results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numerics", choices=("fast", "exact"), default="fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    busy = os.getloadavg()[0]
    torch.set_num_threads(asked.threads)
    model = load(asked.model, numerics=asked.numerics, device=asked.device)
    pages = max(decodes * pages_for(stored + 1) + pages_for(stored + chunk) for decodes, chunk, stored in SHAPES)
    cache = KVCache(model.config, pages, PAGE_TOKENS, model.dtype, asked.device)
    runner = Runner(model, cache, asked.device, whole=SmallSteps.of(model, cache))
    steps = [make_step(*shape) for shape in SHAPES]
    spent: list[list[float]] = [[] for _ in steps]
    for turn in range(asked.rounds + 1):  # the first one warms up
        for step, seconds in zip(steps, spent, strict=True):
            taken = seconds_of(runner, step, asked.device)
            seconds.extend([taken] if turn else [])
    samples = [
        (step.tokens, sum(row.kv_len + len(row.tokens) for row in step.rows), statistics.median(seconds))
        for step, seconds in zip(steps, spent, strict=True)
    ]
    step_time = StepTime.fit(samples)
    errors = [abs(step_time.seconds(step) / seconds - 1) for step, (_, _, seconds) in zip(steps, samples, strict=True)]
    result = {
        "environment": tools.describe_machine()
        | {"threads": asked.threads, "device": asked.device}
        | {"load_before": busy},
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "model": asked.model.name,
        "numerics": asked.numerics,
        "step_time": dataclasses.asdict(step_time),
        "median_relative_error": statistics.median(errors),
        "samples": [dict(zip(("tokens", "slots", "seconds"), sample, strict=True)) for sample in samples],
    }
    (tools.HERE / "results" / f"{asked.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def make_step(decodes: int, chunk: int, stored: int) -> Step:
    """Rows of `decodes` sequences and, with a chunk, of one more, each with so many slots stored."""
    fresh = itertools.count()
    lengths = [1] * decodes + [chunk] * bool(chunk)
    rows = []
    for id, length in enumerate(lengths):
        table = tuple(itertools.islice(fresh, pages_for(stored + length)))
        rows.append(Row(id, stored, (7,) * length, stored, table, True))
    return Step(0, tuple(rows))


def pages_for(slots: int) -> int:
    return -(-slots // PAGE_TOKENS)


def seconds_of(runner: Runner, step: Step, device: str) -> float:
    """Wall time of one step, its logits included."""
    started = time.perf_counter()
    runner.run(step, {})
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
