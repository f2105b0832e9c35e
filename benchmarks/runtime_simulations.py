"""What the runtime's scheduler and pool do, without a model: waste of memory, batching, fairness, and what they cost.

    python benchmarks/runtime_simulations.py --trace AzureLLMInferenceTrace_conv.csv [--step-time JSON]

All but the last figure are in virtual time, where a step takes base_s + token_s per token + slot_s per stored slot. The
default is an assumption, an 8B model in bf16 on one H200 (16 GB of weights at 4.8 TB/s, 16 GFLOP per token at 500
TFLOP/s, 128 KB per slot); --step-time adds a measured one for the long prompt. The last figure is CPU time of this
machine.
"""

import argparse
import csv
import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import tools

from runtime.blocks import BlockPool
from runtime.page import PageType
from runtime.scheduler import Scheduler, SchedulerSettings, StepOutput
from runtime.sequence import Sequence
from runtime.simulator import Arrival, Simulator, StepTime
from runtime.step import Step

PAGE = PageType("bfloat16", 16 * 131_072, 16)
ASSUMED = StepTime(base_s=16e9 / 4.8e12, token_s=16e9 / 500e12, slot_s=131_072 / 4.8e12)
POOL_PAGES = 24_000  # 50 GB
SIMULATED_REQUESTS = 1_500  # of the trace, from its beginning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="CSV with ContextTokens and GeneratedTokens")
    parser.add_argument("--step-time", type=Path, help="JSON of step_time.py")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "runtime-simulations.json")
    asked = parser.parse_args()
    measured = StepTime(**json.loads(asked.step_time.read_text())["step_time"]) if asked.step_time else None
    lengths = read_lengths(asked.trace)
    result = {
        "environment": tools.describe_machine() | {"threads": 1, "load_before": os.getloadavg()[0]},
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "step_time": dataclasses.asdict(ASSUMED),
        "kv_waste": kv_waste(lengths, ASSUMED),
        "continuous_batching": [continuous_batching(batch, seed) for batch in (8, 16, 32) for seed in range(3)],
        "long_prompt": long_prompt(ASSUMED),
        "long_prompt_measured": long_prompt(measured) if measured else None,
        "fairness": fairness(lengths, ASSUMED),
        "bookkeeping": [bookkeeping(sequences) for sequences in (16, 64, 256)],
    }
    result["gates"] = gates(result)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def read_lengths(trace: Path) -> list[tuple[int, int]]:
    """(prompt, generated) tokens of each request."""
    with trace.open() as rows:
        return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(rows)]


def simulator(step_time: StepTime, pages: int = POOL_PAGES, watch: Callable | None = None, **settings) -> Simulator:
    pool = BlockPool(pages, PAGE)
    scheduling = SchedulerSettings(**{"max_queue": 1_000_000} | settings)
    return Simulator(pool, scheduling, step_time, max_length=pool.slots, watch=watch)


def kv_waste(lengths: list[tuple[int, int]], step_time: StepTime) -> dict[str, object]:
    """Slots allocated and not used, as a share of those allocated.

    `static`: every request gets the longest of the trace. `paged`: whole pages of 16 for what it has in the end.
    `paged_over_time`: the same in a full pool, mean over virtual time, with what is reserved for prompts still read.
    """
    totals = [prompt + generated for prompt, generated in lengths]
    used, longest = sum(totals), max(totals)
    pages = sum(-(-total // PAGE.tokens) for total in totals)
    held = {"used": 0.0, "allocated": 0.0, "seconds": 0.0}

    def watch(simulator: Simulator, step: object) -> None:
        seconds, held["seconds"] = simulator.now - held["seconds"], simulator.now
        held["used"] += seconds * sum(sequence.kv_len[0] for sequence in simulator.scheduler.running)
        held["allocated"] += seconds * simulator.scheduler.pool.statistics.owned * PAGE.tokens

    simulated = simulator(step_time, watch=watch)
    simulated.run(Arrival(0.0, prompt, max(generated, 1)) for prompt, generated in lengths[:SIMULATED_REQUESTS])
    return {
        "requests": len(lengths),
        "mean_tokens": used / len(lengths),
        "longest_tokens": longest,
        "static": 1 - used / (longest * len(lengths)),
        "static_at_4096": 1 - sum(min(total, 4096) for total in totals) / (4096 * len(lengths)),
        "paged": 1 - used / (pages * PAGE.tokens),
        "simulated_requests": SIMULATED_REQUESTS,
        "paged_over_time": 1 - held["used"] / held["allocated"],
        "preemptions": simulated.scheduler.preemptions,
    }


def continuous_batching(batch: int, seed: int) -> dict[str, object]:
    """Requests of exponential length, all there at once: in batches of `batch` to the end, against continuously.

    In theory E[longest of a batch] / E[length] = 1 + 1/2 + … + 1/batch.
    """
    rng = random.Random(seed)
    arrivals = [Arrival(0.0, 1, 1 + int(rng.expovariate(1 / 100))) for _ in range(batch * 200)]
    static, continuous = (simulator(StepTime(1.0), max_sequences=batch) for _ in range(2))
    for first in range(0, len(arrivals), batch):
        static.run(arrivals[first : first + batch])
    continuous.run(arrivals)
    theory = sum(1 / n for n in range(1, batch + 1))
    ratio = static.now / continuous.now
    return {"batch": batch, "seed": seed, "ratio": ratio, "theory": theory, "ratio_to_theory": ratio / theory}


def long_prompt(step_time: StepTime) -> dict[str, object]:
    """A prompt of 4,096 tokens comes among 16 decodes: the largest gap between their tokens, over the steady one.

    Steady is what the same step takes without the newcomer: the decodes themselves grow longer in the meantime.
    """
    budget = step_time.token_budget(decodes=16, slots=16 * 600, prompt=4096, factor=1.4)
    outcome: dict[str, object] = {"step_time": dataclasses.asdict(step_time), "token_budget": budget}
    for name, chunked in (("chunked", True), ("unchunked", False)):
        alone: dict[float, float] = {}  # by the time at which a step ends: what its decodes take

        def watch(simulator: Simulator, step: Step, alone: dict[float, float] = alone) -> None:
            alone[simulator.now] = step_time.seconds(Step(0, tuple(row for row in step.rows if row.sequence < 16)))

        simulated = simulator(step_time, watch=watch, token_budget=budget, chunked_prefill=chunked)
        for _ in range(16):
            simulated.add(Arrival(0.0, 500, 20_000))
        while len(simulated.served[15].token_times) < 100:  # all have long been decoding
            simulated.step()
        came = simulated.now
        late = simulated.add(Arrival(came, 4096, 16))
        while late.status != "finished":
            simulated.step()
        times = [served.token_times for served in simulated.served[:16]]
        gaps = [(end, end - start) for one in times for start, end in zip(one, one[1:], strict=False)]
        largest, steady = max(
            ((gap, alone[end]) for end, gap in gaps if end > came), key=lambda pair: pair[0] / pair[1]
        )
        outcome[name] = {
            "steady_gap_s": steady,
            "largest_gap_s": largest,
            "largest_over_steady": largest / steady,
            "first_token_s": simulated.served[-1].token_times[0] - came,
        }
    return outcome


def fairness(lengths: list[tuple[int, int]], step_time: StepTime) -> dict[str, object]:
    """Two tenants with lengths of the trace, one of which floods the line before the other comes."""
    chosen = [(prompt, max(generated, 1)) for prompt, generated in lengths[:1200]]
    arrivals = [
        Arrival(0.0 if index < 600 else 1.0, prompt, generated, "flood" if index < 600 else "late")
        for index, (prompt, generated) in enumerate(chosen)
    ]
    outcome: dict[str, object] = {}
    runs = {}
    for policy in ("fcfs", "vtc"):
        runs[policy] = simulated = simulator(step_time, pages=4000, policy=policy)
        simulated.run(arrivals)
        meter = simulated.scheduler.meter
        first = [s.token_times[0] - s.arrival.time for s in simulated.served if s.arrival.tenant == "late"]
        outcome[policy] = {
            "seconds": simulated.now,
            "largest_service_gap": meter.largest_gap,
            "bound": meter.bound,
            "late_tenant_median_first_token_s": statistics.median(first),
        }
    full = 0.7 * runs["fcfs"].now
    tokens = {
        policy: sum(t <= full for served in simulated.served for t in served.token_times)
        + sum(s.arrival.prompt_tokens for s in simulated.served if s.token_times[0] <= full)
        for policy, simulated in runs.items()
    }
    outcome["throughput_vtc_over_fcfs"] = tokens["vtc"] / tokens["fcfs"]
    return outcome


def bookkeeping(sequences: int, steps: int = 600) -> dict[str, object]:
    """CPU time of `schedule` and `postprocess` per step, all decoding, each about 1,000 tokens long.

    CPU time too grows with other work beside it: the quietest of the rounds of 30 steps is given with the whole.
    """
    pool = BlockPool(POOL_PAGES, PAGE)
    scheduler = Scheduler(pool, SchedulerSettings(max_sequences=sequences), max_length=4096)
    for id in range(sequences):
        scheduler.add(Sequence(id, str(id), [id] * (700 + id), 2000, tenant=str(id % 4)))
    spent = []
    while len(spent) < steps:
        before = time.process_time()
        step = scheduler.schedule()
        between = time.process_time()
        output = StepOutput({row.sequence: 7 for row in step.rows if row.samples})
        after = time.process_time()
        scheduler.postprocess(step, output)
        if len(step.rows) == sequences == step.tokens:
            spent.append(between - before + time.process_time() - after)
    rounds = [statistics.median(spent[first : first + 30]) for first in range(0, steps, 30)]
    return {
        "sequences": sequences,
        "quietest_round_median_ms": 1e3 * min(rounds),
        "median_ms": 1e3 * statistics.median(spent),
        "p99_ms": 1e3 * sorted(spent)[int(0.99 * steps)],
    }


def gates(result: dict) -> dict[str, bool]:
    """What was promised, and whether it is so."""
    waste = result["kv_waste"]
    prompts = [one for one in (result["long_prompt"], result["long_prompt_measured"]) if one]
    return {
        "paged waste below 4 %": max(waste["paged"], waste["paged_over_time"]) < 0.04,
        "static waste above 60 %": min(waste["static"], waste["static_at_4096"]) > 0.6,
        "batching within 10 % of theory": all(
            abs(one["ratio_to_theory"] - 1) <= 0.1 for one in result["continuous_batching"]
        ),
        "largest gap with chunks at most 1.5 x": all(one["chunked"]["largest_over_steady"] <= 1.5 for one in prompts),
        "largest gap without chunks at least 5 x": all(one["unchunked"]["largest_over_steady"] >= 5 for one in prompts),
        "vtc within its bound": result["fairness"]["vtc"]["largest_service_gap"] <= result["fairness"]["vtc"]["bound"],
        "vtc throughput within 2 % of fcfs": abs(result["fairness"]["throughput_vtc_over_fcfs"] - 1) <= 0.02,
        "bookkeeping at 256 sequences at most 1 ms": result["bookkeeping"][-1]["quietest_round_median_ms"] <= 1,
    }


if __name__ == "__main__":
    main()
